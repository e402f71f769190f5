"""Pruning a model, from top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.config import PruneOptions
from adapruner.errors import AdaPrunerError
from adapruner.models._device import computing_repeatably, resolve_devices
from adapruner.processes import this_process
from adapruner.progress import Reporter
from adapruner.result import PruneResult
from adapruner.run.given import ModelGiven, TextData
from adapruner.run.making import check, making_of, saying_what_is_kept
from adapruner.run.nodes import chosen, evaluated
from adapruner.run.options import earlier_run, resolve, run_folder


@torch.inference_mode(False)  # measuring and training need gradients, whatever the caller does
def prune(
    model: ModelGiven | None = None,
    calibration: TextData | None = None,
    *,
    output: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    config: PruneOptions | None = None,
    recipe: str | Path | None = None,
    from_: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> PruneResult:
    """Prunes a causal language model: measures, searches, cuts, saves, optionally fine-tunes, and evaluates.

    Called again with the same output, it loads what an earlier call made from the same model, text and options, and
    makes the rest.

    Args:
        model: Hub id, model folder, `.gguf` file, `smollm2`, or a model in memory with its `tokenizer`, which is not
            changed, and written to the run folder first; None takes the model of the recipe, the config or the earlier
            run.
        calibration: the calibration dataset: a name; documents, as an iterable of strings or the rows of a
            `datasets.Dataset` with a column of text; or windows of tokens, [windows, tokens], int64.
        output: the run folder; the pruned model is in its `model/`, the fine-tuned one in `recovered/`. By default a
            temporary one that is removed with the result: save the model elsewhere if you want to keep it.
        tokenizer: of a model in memory.
        config: options to start from: a `PruneConfig` or `PruneOptions`; keyword arguments override them.
        recipe: the same, by the name of a shipped recipe or a YAML file.
        from_: folder of an earlier run. Its options are those to start from, and what it made is taken over as far as
            it depends on the same options; its search also if only the ratio differs.
        overwrite: rebuild what was made with other options, from another model or other text.
        options: the fields of `PruneOptions`, and of `SizeLimit` instead of a ratio.

    Raises:
        AdaPrunerError: an option, the model, the text or the folder is invalid; before any long work.
    """
    run = run_folder(output)
    earlier = earlier_run(from_, run)
    resolved = resolve({"model": model, "calibration": calibration, **options}, tokenizer, run, recipe, config, earlier)
    if (count := this_process().count) > 1:
        raise AdaPrunerError(
            f"pruning runs in one process, and {count} were started: prune with one, then train the pruned model with"
            " several by adapruner recover"
        )
    run.check_usable()
    reporter = Reporter()
    with computing_repeatably(resolve_devices(resolved.device)[0]):
        making = making_of(resolved, run, reporter, earlier)
        check(making, overwrite)
        with run.locked():
            run.check_usable()
            if not overwrite:
                making.refuse_outdated()
            reporter.log = run.log
            run.save_config(making.value("config"))
            run.remove_given_but(resolved)
            with saying_what_is_kept(making):
                making.make_missing()
            return PruneResult(run.path, making.value(chosen.plan), making.value(evaluated.result), run)
