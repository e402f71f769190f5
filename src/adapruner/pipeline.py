"""The commands on a run folder: prune a model, prune it at another ratio, join as an additional worker."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer
from typing_extensions import Unpack

from adapruner import procedure
from adapruner.arguments import PruneArguments, RunArguments, TargetArguments
from adapruner.callbacks import Callback
from adapruner.checkpoint import check_push, push
from adapruner.config import BUDGETS, FUNCTION, TARGET_OPTIONS, TARGETS, PruneConfig, PruneOptions, Tracker
from adapruner.driver import Driver, refuse_outdated
from adapruner.errors import AdaPrunerError, NonFiniteError, describe_failure
from adapruner.evaluation import check_tasks
from adapruner.given import ModelGiven, TextData, name_of_code
from adapruner.inputs import resolve
from adapruner.job import Job, Preparation, register_extensions
from adapruner.models import computing_repeatably
from adapruner.paths import given_path
from adapruner.preview import Preview, preview
from adapruner.processes import Process, this_process
from adapruner.progress import Reporter
from adapruner.result import PruneResult
from adapruner.run import RunFolder
from adapruner.search import ItemLosses
from adapruner.tracking import Tracking, check_tracker

_SECONDS_BETWEEN_LOOKS = 0.2


def prune(
    model: ModelGiven | None = None, calibration: TextData | None = None, **arguments: Unpack[RunArguments]
) -> PruneResult:
    """Prunes a causal language model: measures, searches, cuts, saves, optionally fine-tunes, and evaluates.

    Called again with the same output, it loads what an earlier call made from the same model, text and options, and
    makes the rest. Started by `torchrun` or `accelerate launch`, all processes measure, search and train together;
    `join` adds workers to a search.

    Args:
        model: Hub id, model folder, `.gguf` file, `smollm2`, or a model in memory with its `tokenizer`; None takes the
            model of the recipe or the config. A model in memory is written to the run folder first, and read from there
            as any other: it is not changed, and the run needs the memory of a second one.
        calibration: the calibration dataset: a name; documents: a list or other iterable of strings, or the rows of a
            `datasets.Dataset` with a column of text; or windows of tokens, [windows, tokens], int64. What is in memory
            is written to the run folder too.
        output: the run folder; the pruned model is in its `model/`, the fine-tuned one in `recovered/`. By default a
            temporary one that is removed with the result: save the model elsewhere if you want to keep it.
        tokenizer: of a model in memory.
        config: options to start from: a `PruneConfig` or `PruneOptions`; keyword arguments override them.
        recipe: the same, by the name of a shipped recipe or a YAML file.
        overwrite: rebuild what was made with other options, from another model or other text.
        objective: the dataset whose loss judges the trials, as for `calibration`; or a function that is given a pruned
            model, in evaluation mode and on the device of the run, and returns its loss on each of some items,
            [items]. The items are the same for every model, because candidates are compared item by item; lower is
            better. Call `prune` with the same function to resume.
        objective_version: of the function, for `resume`: results of another version are not used. By default a hash of
            the file that the function is in.
        callbacks: told of stages and trials.
        storage: URL of an SQL database that keeps the trials (`postgresql://…`); by default a SQLite file in the run
            folder.
        push_to_hub: upload the model, the recovered one if there is one, to this repository, `owner/name`.
        hub_private: whether a new repository is private.
        hub_revision: branch.
        hub_token: by default that of the login.
        track: experiment tracker that gets trials, training curves, stage times and perplexities; None sends nothing.
        arguments: the above, and the fields of `PruneOptions`.

    Raises:
        AdaPrunerError: an option, the model, the text or the folder is invalid; before any long work.
    """
    if isinstance(ratio := arguments.get("ratio"), list | tuple) and len(ratio) > 1:
        raise AdaPrunerError(f"`ratio` names {len(ratio)} ratios: prune_ratios gives a result for each")
    (result,) = prune_ratios(model, calibration, **arguments)
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
    objective_version: str | None = None,
    callbacks: Sequence[Callback] = (),
    storage: str | None = None,
    push_to_hub: str | None = None,
    hub_private: bool = True,
    hub_revision: str | None = None,
    hub_token: str | None = None,
    track: Tracker | None = None,
    **options: Unpack[PruneArguments],
) -> list[PruneResult]:
    """`prune` for several values of `ratio`: measures once, and searches for each; the arguments are the same.

    Returns:
        The results, one for each ratio in ascending order.

    Raises:
        AdaPrunerError: an option, the model, the text or the folder is invalid; before any long work.
    """
    check_tracker(track)
    run = _run_folder(output)
    objective = options.get("objective")
    item_losses = objective if callable(objective) else None
    given: dict[str, Any] = {"model": model, "calibration": calibration, **options}
    if item_losses:
        given["objective"] = FUNCTION + name_of_code(item_losses, objective_version)
    resolved = resolve(given, tokenizer, run, recipe, config)
    if push_to_hub:
        if len(resolved.ratio) > 1:
            raise AdaPrunerError("`push_to_hub` uploads one model: give one `ratio`")
        check_push(push_to_hub, hub_token)
    results = _run(resolved, run, overwrite, storage, item_losses=item_losses, callbacks=callbacks, track=track)
    if push_to_hub and this_process().leads:
        push(results[0].model_folder, push_to_hub, hub_private, hub_revision, hub_token)
    return results


def _run_folder(output: str | Path | None) -> RunFolder:
    if output is not None:
        return RunFolder(given_path(output))
    if this_process().count > 1:
        raise AdaPrunerError("several processes share a run folder: name it with `output`")
    return RunFolder.temporary()


def preview_ratios(
    model: str | None,
    *,
    output: str | Path,
    recipe: str | Path | None = None,
    overwrite: bool = False,
    storage: str | None = None,
    **options: Unpack[PruneArguments],
) -> list[Preview]:
    """What `prune_ratios` would make with the same arguments, all of them names, after the same checks; writes nothing.

    Raises:
        AdaPrunerError: what the run would be refused for.
    """
    run = RunFolder(given_path(output))
    given: dict[str, Any] = {"model": model, **options}
    run.check_usable()
    preparation = Preparation(resolve(given, None, run, recipe, None), run, storage, this_process(), Reporter())
    return [preview(driver) for driver in _checked_drivers(preparation, overwrite)]


def plan_again(
    source: str | Path,
    output: str | Path,
    ratio: float | None = None,
    overwrite: bool = False,
    **target: Unpack[TargetArguments],
) -> PruneResult:
    """Another ratio with the statistics and the best point of a finished search: no measuring, no search. Nothing is
    levelled where a Python function judged the trials, as there is none here.

    Args:
        source: the folder of the earlier run.
        output: the folder of the new run.
        ratio: the new ratio.
        target: what replaces it, as for `prune`.

    Raises:
        AdaPrunerError: the earlier run has no finished search or was made from other files, or the ratio, the target or
            the new folder is invalid.
    """
    earlier, run = RunFolder(given_path(source)), RunFolder(given_path(output))
    if run.path.resolve() == earlier.path.resolve():
        raise AdaPrunerError(f"{output} is the earlier run itself: choose another `output`")
    config = earlier.read_config()
    register_extensions(config)
    if (ratio is None) is all(target.get(name) is None for name in TARGETS):
        raise AdaPrunerError(f"give one of {', '.join(f'`{name}`' for name in BUDGETS)}: how much is removed")
    # What the earlier run was to meet does not count any more.
    unset = {name: PruneOptions.model_fields[name].default for name in TARGET_OPTIONS}
    options = config.model_dump() | unset | target
    if ratio is None:
        if target.get("target_speed") and _is_layer_wise(earlier.at_ratio(config.ratio[0], config)):
            raise AdaPrunerError(
                f"`target_speed` is measured with all layers in memory, and {source} did not have them: give a `ratio`"
            )
        aim = Preparation(PruneConfig.from_options(**options), run, None, Process(), Reporter(), (earlier,))
        aim.meet_target()
        (ratio,) = aim.config.ratio
    nearest = min(config.ratio, key=lambda searched: abs(searched - ratio))
    options |= {"ratio": ratio, "search_ratio": config.search_ratio or nearest, "search_target": config.searched_target}
    # Whether the model fits depends on the ratio, and what was searched on how it computes.
    layer_wise = _is_layer_wise(earlier.at_ratio(nearest, config))
    options["layer_wise"] = config.layer_wise if layer_wise is None else layer_wise
    if config.objective_function:
        options["level_rounds"] = 0
    again = PruneConfig.from_options(**options)
    (result,) = _run(again, run, overwrite, None, (earlier, earlier.at_ratio(nearest, config)))
    return result


def _is_layer_wise(run: RunFolder) -> bool | None:
    """Whether the search of a run was done layer by layer; None where there is none."""
    record = run.record(procedure.search.name)
    return bool(record.leaves["precision"]["layer_wise"]) if record else None


def join(output: str | Path, storage: str | None = None, device: str = "auto") -> None:
    """Runs trials of a search in progress as an additional worker, until all are finished or running.

    Args:
        output: the run folder, as this machine sees it.
        storage: that of the run.
        device: where this worker runs.

    Raises:
        AdaPrunerError: no run is in progress there, or this worker would compute other numbers.
    """
    run = RunFolder(given_path(output))
    if not run.is_running():
        raise AdaPrunerError(f"no run is in progress in {output}: start it with adapruner prune")
    config = run.read_config()
    register_extensions(config)
    # Numbers depend on whether the run is done layer by layer, which its record says.
    preparation: Preparation | None = None
    while run.is_running():
        for ratio in config.ratio:
            folder = run.at_ratio(ratio, config)
            record = folder.record(procedure.search.name)
            if record is None or record.files is not None:
                continue
            if preparation is None:
                # Not the first process of the run: it leads no search.
                by_layer = record.leaves["precision"]["layer_wise"]
                own = config.model_copy(update={"device": device, "layer_wise": by_layer})
                preparation = Preparation(own, run, storage, Process(rank=1), Reporter())
                preparation.check_storage()
            driver = _driver(preparation, ratio)
            if record.key != driver.job.keys[procedure.search.name]:
                changes = ", ".join(record.changes(driver.records[procedure.search.name])) or "other files"
                raise AdaPrunerError(f"this worker would compute other numbers than the run: {changes}")
            trials = preparation.study(record.key).file
            if trials is not None and not trials.is_file():  # the run has not opened it yet, or keeps them elsewhere
                continue
            with computing_repeatably(preparation.device):
                procedure.search.make(driver.job, folder.path, *map(driver.value, procedure.search.inputs))
            return
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    Reporter().note(f"nothing to run: the run in {output} has ended, or keeps its trials in another `storage`")


@torch.inference_mode(False)  # measuring and training need gradients, whatever the caller does
def _run(
    config: PruneConfig,
    run: RunFolder,
    overwrite: bool,
    storage: str | None,
    others: Sequence[RunFolder] = (),
    item_losses: ItemLosses | None = None,
    callbacks: Sequence[Callback] = (),
    track: Tracker | None = None,
) -> list[PruneResult]:
    """Makes what is missing of a run in its folder."""
    process = this_process()
    run.check_usable()
    quiet = not process.leads
    tracking = Tracking(track if process.leads else None, run.path, Reporter(quiet=quiet).note)
    told = (*callbacks, tracking) if process.leads else ()
    reporter = Reporter(quiet=quiet, watchers=told)
    preparation = Preparation(config, run, storage, process, reporter, tuple(others), item_losses, told)
    with process.connected(preparation.device), computing_repeatably(preparation.device):
        _checked_drivers(preparation, overwrite, others)
        config = preparation.config
        with run.locked() if process.leads else contextlib.nullcontext():
            if process.leads:
                run.check_usable()
            preparation.reporter = Reporter(run.log if process.leads else None, quiet, told)
            with tracking, _saying_what_is_kept(preparation):
                drivers = [_driver(preparation, ratio, others) for ratio in config.ratio]
                if process.leads:
                    if not overwrite:
                        refuse_outdated(drivers, run.path)
                    run.save_config(config)
                    run.remove_given_but(config)
                for driver in drivers:
                    _make_missing(driver)
            return [_result(driver) for driver in drivers]


def _checked_drivers(preparation: Preparation, overwrite: bool, others: Sequence[RunFolder] = ()) -> list[Driver]:
    """One for each ratio, after everything that can be refused before the work was."""
    preparation.meet_target()
    drivers = [_driver(preparation, ratio, others) for ratio in preparation.config.ratio]
    if not overwrite:
        refuse_outdated(drivers, preparation.folder.path)
    if preparation.config.tasks:
        check_tasks(preparation.config.tasks)
    for driver in drivers:
        _check(driver, others)
    return drivers


def _driver(preparation: Preparation, ratio: float, others: Sequence[RunFolder] = ()) -> Driver:
    config, root = preparation.config, preparation.folder
    folder = root.at_ratio(ratio, config)
    job = Job(config.model_copy(update={"ratio": (ratio,)}), folder, preparation, {})
    # What an earlier run for this ratio alone, or for others too, made is taken over.
    return Driver(job, root, (*others, root, root.of_ratio(ratio)))


def _check(driver: Driver, searched: Sequence[RunFolder]) -> None:
    """Prepares what the missing artifacts need, and refuses what would fail later.

    Args:
        searched: folders that are to hold the search.
    """
    missing = driver.missing()
    if searched and procedure.search in missing:
        raise AdaPrunerError(
            f"{searched[0].path} has no finished search of this model and text with its options: rerun the command"
            " of that run first"
        )
    for artifact in missing:
        artifact.check(driver.job)


def _make_missing(driver: Driver) -> None:
    process, reporter = driver.job.prepared.process, driver.job.prepared.reporter
    # Another ratio may have left out windows.
    driver.refresh()
    if process.leads:
        driver.take_over()
        if left_out := driver.job.prepared.left_out(driver.job.keys):
            driver.job.prepared.leave_out(driver.job.keys, left_out)
        # The page is written by `write_reports` too.
        for artifact in (one for one in driver.wanted if one is not procedure.report and driver.is_damaged(one)):
            place = driver.folder(artifact).path / artifact.name
            reporter.note(f"{place} was changed or damaged since it was written: rebuilding it")
    while names := process.from_first([artifact.name for artifact in driver.missing()]):
        try:
            driver.make(next(artifact for artifact in driver.wanted if artifact.name == names[0]))
        except NonFiniteError:
            before = dict(driver.job.keys)
            driver.refresh()
            if driver.job.keys == before:
                raise
    if process.leads:
        for folder in (driver.root, driver.job.folder):
            folder.remove_unfinished()


def _result(driver: Driver) -> PruneResult:
    plan, result = driver.value(procedure.plan), driver.value(procedure.result)
    assert plan is not None
    assert result is not None
    return PruneResult(driver.job.folder.path, plan, result, driver.root)


@contextlib.contextmanager
def _saying_what_is_kept(preparation: Preparation) -> Iterator[None]:
    """Turns failures of the machine into one line.

    Raises:
        AdaPrunerError: in their place.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        stage = preparation.reporter.current
        failure = describe_failure(error, _what_needs_less(preparation, stage))
        if failure is None:
            raise
        raise AdaPrunerError(
            f"{stage}: {failure}. Finished artifacts are kept in {preparation.folder.path}: rerun the same command to"
            " resume"
        ) from error


def _what_needs_less(preparation: Preparation, stage: str) -> str:
    """What the user can do where a stage has run out of memory."""
    if stage == "recovering":
        model = preparation.folder.model
        return f"adapruner recover {model} with a smaller `micro_batch_size` needs less memory"
    if not preparation.layer_wise and preparation.location.gguf_file is None:
        return "`layer_wise` needs less memory; with `overwrite`, it rebuilds what was made with all layers in memory"
    return "`dtype` bfloat16 and a smaller `pool` need less memory, in another run"
