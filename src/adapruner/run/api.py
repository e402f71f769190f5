"""Pruning a model, from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.config import PruneConfig, PruneOptions
from adapruner.errors import AdaPrunerError
from adapruner.graph import RunFolder, make_all, refuse_outdated
from adapruner.models import computing_repeatably, resolve_devices
from adapruner.processes import this_process
from adapruner.progress import Reporter
from adapruner.result import PruneResult
from adapruner.run.given import ModelGiven, TextData
from adapruner.run.makings import check, makings_of, saying_what_is_kept
from adapruner.run.nodes import chosen, result as numbers
from adapruner.run.options import resolve, run_folder


def prune(model: ModelGiven | None = None, calibration: TextData | None = None, **options: Any) -> PruneResult:
    """Prunes a causal language model: measures, searches, cuts, saves, optionally fine-tunes, and evaluates.

    Called again with the same output, it loads what an earlier call made from the same model, text and options, and
    makes the rest.

    Args:
        model: Hub id, model folder, `.gguf` file, `smollm2`, or a model in memory with its `tokenizer`, which is not
            changed, and written to the run folder first; None takes the model of the recipe or the config.
        calibration: the calibration dataset: a name; documents, as an iterable of strings or the rows of a
            `datasets.Dataset` with a column of text; or windows of tokens, [windows, tokens], int64.
        options: the arguments of `prune_ratios`, and the fields of `PruneOptions`.

    Raises:
        AdaPrunerError: an option, the model, the text or the folder is invalid; before any long work.
    """
    if isinstance(ratio := options.get("ratio"), list | tuple) and len(ratio) > 1:
        raise AdaPrunerError(f"`ratio` names {len(ratio)} ratios: prune_ratios gives a result for each")
    (result,) = prune_ratios(model, calibration, **options)
    return result


def prune_ratios(
    model: ModelGiven | None = None,
    calibration: TextData | None = None,
    *,
    output: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    config: PruneOptions | None = None,
    recipe: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> list[PruneResult]:
    """`prune` for several values of `ratio`: measures once, and searches for each.

    Args:
        output: the run folder; the pruned model is in its `model/`, the fine-tuned one in `recovered/`. By default a
            temporary one that is removed with the result: save the model elsewhere if you want to keep it.
        tokenizer: of a model in memory.
        config: options to start from: a `PruneConfig` or `PruneOptions`; keyword arguments override them.
        recipe: the same, by the name of a shipped recipe or a YAML file.
        overwrite: rebuild what was made with other options, from another model or other text.
        options: the fields of `PruneOptions`.

    Returns:
        The results, one for each ratio in ascending order.

    Raises:
        AdaPrunerError: an option, the model, the text or the folder is invalid; before any long work.
    """
    run = run_folder(output)
    resolved = resolve({"model": model, "calibration": calibration, **options}, tokenizer, run, recipe, config)
    return make_run(resolved, run, overwrite)


@torch.inference_mode(False)  # measuring and training need gradients, whatever the caller does
def make_run(
    config: PruneConfig,
    run: RunFolder,
    overwrite: bool,
    others: Sequence[RunFolder] = (),
    taken: Mapping[str, RunFolder] | None = None,
) -> list[PruneResult]:
    """Makes what is missing of a run in its folder. What can be refused is refused before the work begins.

    Args:
        others, taken: see `Making`.

    Raises:
        AdaPrunerError: several processes were started, or the run is refused.
    """
    if (count := this_process().count) > 1:
        raise AdaPrunerError(
            f"pruning runs in one process, and {count} were started: prune with one, then train the pruned model with"
            " several by adapruner recover"
        )
    run.check_usable()
    reporter = Reporter()
    with computing_repeatably(resolve_devices(config.device)[0]):
        makings = makings_of(config, run, reporter, others, taken or {})
        check(makings, overwrite)
        with run.locked():
            run.check_usable()
            if not overwrite:
                refuse_outdated(makings, run.path)
            reporter.log = run.log
            run.save_config(config)
            run.remove_given_but(config)
            with saying_what_is_kept(makings[0]):
                make_all(makings)
            return [PruneResult(it.folder.path, it.value(chosen.plan), it.value(numbers.result), run) for it in makings]
