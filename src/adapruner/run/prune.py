"""Pruning a model, from top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError, describe_failure
from adapruner.base.files import given_path
from adapruner.base.processes import this_process
from adapruner.base.progress import Reporter
from adapruner.evaluation.tasks import check_tasks
from adapruner.families import open_config
from adapruner.graph.making import Making
from adapruner.model.architecture import architecture_of
from adapruner.model.device import computing_repeatably, resolve_devices
from adapruner.model.places import find_model
from adapruner.option_rules import EXPERT_TRIALS
from adapruner.options import PruneConfig, PruneOptions
from adapruner.run import choice, evaluation, inputs
from adapruner.run.evaluation import GRAPH
from adapruner.run.folder import RunFolder
from adapruner.run.given import ModelGiven, TextData
from adapruner.run.options import earlier_run, resolve
from adapruner.run.result import PruneResult


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
    """Prunes a causal language model: measures, searches, cuts, heals, saves and evaluates.

    Called again with the same output, it loads what an earlier call made from the same model, text and options, and
    makes the rest.

    Args:
        model: Hub id, model folder, `.gguf` file, `smollm2`, or a model in memory with its `tokenizer`, which is not
            changed, and written to the run folder first; None takes the model of the recipe, the config or the earlier
            run.
        calibration: the calibration text, by default `mix`: names with shares; documents, as an iterable of strings or
            the rows of a `datasets.Dataset` with a column of text; or windows of tokens, [windows, tokens], int64.
        output: the run folder; the pruned model is in its `model/`. By default a temporary one that is
            removed with the result: save the model elsewhere if you want to keep it.
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
    run = RunFolder.temporary() if output is None else RunFolder(given_path(output))
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
            try:
                making.make_missing()
            except (MemoryError, RuntimeError, OSError) as error:
                failure = describe_failure(error, _what_needs_less(making))
                if failure is None:
                    raise
                raise AdaPrunerError(
                    f"{reporter.current}: {failure}. Finished artifacts are kept in {run.path}: rerun the same command"
                    " to resume"
                ) from error
            return PruneResult(run.path, making.value(choice.plan), making.value(evaluation.result), run)


def making_of(config: PruneConfig, run: RunFolder, reporter: Reporter, earlier: RunFolder | None = None) -> Making:
    """What makes a run.

    Args:
        earlier: a run whose artifacts are taken over: those with the same key, and its search if only the ratio
            differs.
    """
    # Experts have no ranking without a search.
    if config.trials is None and architecture_of(open_config(find_model(config.model))).experts:
        config = config.model_copy(update={"trials": EXPERT_TRIALS})
    given = {
        "config": config,
        "reporter": reporter,
        "run_folder": run,
        "stage_costs": lambda: reporter.finished_stages([making.record(node).key for node in making.wanted]),
    }
    making: Making = Making(
        graph=GRAPH,
        options=dict(config),
        as_json=config.model_dump(mode="json"),
        given=given,
        folder=run,
        reporter=reporter,
        others=() if earlier is None else (earlier,),
    )
    if earlier and (then := earlier.record(choice.found.path)):
        now = making.record(choice.found)
        at_ratio = now.model_copy(update={"options": now.options | {"ratio": then.options.get("ratio")}})
        if now.key != then.key == at_ratio.key and earlier.is_made(then.name, then.key):
            making.taken = {then.name: then.model_copy(update={"files": None})}
            given["config"] = config.model_copy(update={"searched": then.options["ratio"]})
    return making


def check(making: Making, overwrite: bool) -> None:
    """Refuses what would fail later.

    Raises:
        AdaPrunerError: something would be replaced that was made otherwise, or cannot be made.
    """
    if not overwrite:
        making.refuse_outdated()
    if tasks := making.options["tasks"]:
        check_tasks(tasks)
    missing = making.missing()
    making.prepare(missing)


def _what_needs_less(making: Making) -> str:
    """Advice to the user where the current stage has run out of memory."""
    if not making.value(inputs.placement).layer_wise and making.value(inputs.location).gguf_file is None:
        return "`layer_wise` needs less memory; with `overwrite`, it rebuilds what was made with all layers in memory"
    return "`dtype` bfloat16 and a smaller `pool` need less memory, in another run"
