"""The whole job as a list of stages; each reads and writes the run folder, so that the same call goes on."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from adapruner import stages
from adapruner.checkpoint import check_push, push
from adapruner.config import PruneConfig, RecoveryOptions, read_recipe
from adapruner.errors import AdaPrunerError, NonFiniteError, describe_failure
from adapruner.job import Job, prepare
from adapruner.measurement import Statistics, StoredMoments
from adapruner.paths import given_path
from adapruner.processes import Process, this_process
from adapruner.progress import Reporter
from adapruner.report import write_report
from adapruner.result import PruneResult, SearchOutcome, build_result, read_result
from adapruner.run_folder import RunFolder


def prune(
    model: str | None,
    output: str | Path,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    recipe: str | Path | None = None,
    storage: str | None = None,
    **options: Any,
) -> PruneResult:
    """Makes a causal language model smaller: measures, searches, cuts, saves, trains again if asked to, and evaluates.

    The same call again goes on where an earlier one stopped. Started by `torchrun` or `accelerate launch`, all
    processes measure, search and train together, and the first does the rest; `join` adds further ones.

    Args:
        model: hub id, model folder, `.gguf` file, or `smollm2`; None takes that of the recipe.
        output: the run folder; the pruned model is in its `model/`, the one trained afterwards in `recovered/`.
        overwrite: start again where the folder holds a run of another config.
        push_to_hub: upload the model, recovered if it was, to this repository, `owner/name`.
        recipe: options to start from, by the name of a recipe of this package or a YAML file; others go before them.
        storage: URL of an SQL database that keeps the trials (`postgresql://…`); by default a journal in the run folder
            does.
        options: the fields of `PruneOptions`.

    Raises:
        AdaPrunerError: an option, the model, the text or the folder will not do; before any long work.
    """
    config = _config(model, recipe, options)
    run, process = RunFolder(given_path(output)), this_process()
    if overwrite and process.count > 1:
        raise AdaPrunerError(f"--overwrite goes with one process: remove {run.path} first")
    if not process.leads:
        return _assist(config, run, process, storage)
    run.check(config, overwrite)
    if push_to_hub:
        check_push(push_to_hub)
    if overwrite or not run.config.is_file():
        job = prepare(config, run, None, storage, overwrite)
        with run.leading():
            run.create(config, overwrite)
            _run_stages(job)
    else:
        with run.leading():
            _discard_damaged(run)
            if not run.result.is_file():
                job = prepare(config, run, run.windows, storage)
                run.create(config, overwrite=False)
                _run_stages(job)
            elif not run.report.is_file():
                write_report(run)
    if push_to_hub:
        push(run.recovered if config.recover else run.model, push_to_hub)
    return read_result(run)


def _discard_damaged(run: RunFolder) -> None:
    for path in run.discard_damaged():
        if path != run.result:
            Reporter().note(f"{path} was changed or damaged since it was written: it is made again")


def _config(model: str | None, recipe: str | Path | None, options: dict[str, Any]) -> PruneConfig:
    given = read_recipe(recipe) if recipe else {}
    if isinstance(given.get("recovery"), dict) and isinstance(options.get("recovery"), dict):
        options = options | {"recovery": given["recovery"] | options["recovery"]}
    if model is not None:
        options = options | {"model": model}
    if "model" not in given | options:
        raise AdaPrunerError("name a model: hub id, model folder, .gguf file, or smollm2")
    return PruneConfig.from_options(**given | options)


def plan_again(source: str | Path, output: str | Path, ratio: float, overwrite: bool = False) -> PruneResult:
    """Another ratio with the statistics and the best point of a finished search: no measuring, no search.

    Args:
        source: the run folder of the earlier run.
        output: the run folder of the new one.

    Raises:
        AdaPrunerError: the earlier run has not got so far, or the ratio or the new folder will not do.
    """
    earlier, run = RunFolder(given_path(source)), RunFolder(given_path(output))
    if run.path.resolve() == earlier.path.resolve():
        raise AdaPrunerError(f"{output} is the earlier run itself: choose another output")
    if not earlier.search.is_file():
        raise AdaPrunerError(f"{source} holds no finished search: run adapruner prune first")
    if damaged := earlier.damaged_measurements():
        raise AdaPrunerError(
            f"{damaged[0]} was changed or damaged since it was written: give the command of that run again, which makes"
            " it again"
        )
    options = PruneConfig.load(earlier.config).model_dump() | {"ratio": ratio}
    config = PruneConfig.from_options(**options)
    run.check(config, overwrite)
    if not overwrite and run.config.is_file():
        with run.leading():
            _discard_damaged(run)
            if run.result.is_file():
                if not run.report.is_file():
                    write_report(run)
                return read_result(run)
    job = prepare(config, run, earlier.windows, overwrite=overwrite)
    with run.leading():
        run.create(config, overwrite)
        run.take_over(earlier)
        return _run_stages(job)


def join(output: str | Path, storage: str | None = None, device: str = "auto") -> None:
    """Measures and runs trials beside the process that is at a run, until there is nothing left to help with.

    Args:
        output: the run folder, as this machine sees it.
        storage: that of the run.
        device: where this process runs.

    Raises:
        AdaPrunerError: no process is at a run there, or it ended.
    """
    run = RunFolder(given_path(output))
    if not run.is_led():
        raise AdaPrunerError(f"no process is at a run in {output}: start it with adapruner prune")
    run.wait_for(run.config)
    own = {"device": device, "recover": None, "recovery": RecoveryOptions()}
    config = PruneConfig.load(run.config).model_copy(update=own)
    _help(config, run, f"{socket.gethostname()}-{os.getpid()}", random.random(), storage)


def _assist(config: PruneConfig, run: RunFolder, process: Process, storage: str | None) -> PruneResult:
    """What a process that does not lead does of `prune`."""
    Reporter().note(f"process {process.rank} waits for process 0 at {run.path}, which all must see")
    while not run.is_led():
        if run.result.is_file():
            return read_result(run)
        time.sleep(0.2)
    run.wait_for(run.config)
    job, model, windows = _help(config, run, str(process.rank), process.rank / process.count, storage)
    if config.recover is not None:
        run.wait_for(run.model)
        stages.stage_recover(job, model, windows, Reporter())
    run.wait_for(run.result)
    return read_result(run)


def _help(
    config: PruneConfig, run: RunFolder, name: str, begin_at: float, storage: str | None
) -> tuple[Job, PreTrainedModel, dict[str, Tensor]]:
    """Measures and searches beside the process that leads."""
    reporter = Reporter()
    run.wait_for(run.windows)
    job = prepare(config, run, run.windows, storage, reports=False)
    model = stages.stage_load(job, reporter)
    windows = load_file(run.windows)
    if not run.statistics.is_file():
        stages.help_measuring(job, model, windows["pool"], begin_at, reporter)
    run.wait_for(run.statistics)
    if not run.search.is_file():
        stages.help_searching(job, model, windows["objective"], name, reporter)
    return job, model, windows


def _run_stages(job: Job) -> PruneResult:
    reporter = Reporter(job.run.log)
    with _saying_what_is_kept(job, reporter):
        # Before there is anything to help with: helpers read where the trials will be.
        job.study.register()
        model = stages.stage_load(job, reporter)
        windows = stages.stage_windows(job, model, reporter)
        try:
            moments, statistics, outcome = _choose(job, model, windows, reporter)
        except NonFiniteError as error:
            windows = stages.drop_broken_windows(job, model, windows, error, reporter)
            moments, statistics, outcome = _choose(job, model, windows, reporter)
        plan = stages.stage_plan(job, statistics, outcome)
        fixed_plan = stages.plan_at_ratio(job.structure, statistics, outcome.best_fixed, job.config)
        del statistics
        stages.stage_save(job, model, plan, moments, windows, reporter)
        recovery = stages.stage_recover(job, model, windows, reporter)
        perplexities = stages.stage_evaluate(job, model, fixed_plan, reporter)
        scores = stages.stage_tasks(job, model, reporter)
        parameters = stages.count_saved_parameters(job.run.model)
        finished = reporter.finished_stages()
        counts = {use: len(each) for use, each in windows.items()}
        result = build_result(job.config, plan, parameters, outcome, recovery, perplexities, scores, finished, counts)
        stages.write_cards(job, plan, result)
        job.run.save_json(result, job.run.result)
        write_report(job.run)
    return read_result(job.run)


def _choose(
    job: Job, model: PreTrainedModel, windows: dict[str, Tensor], reporter: Reporter
) -> tuple[StoredMoments | None, Statistics, SearchOutcome]:
    moments = stages.stage_moments(job, model, windows, reporter)
    statistics = stages.stage_measure(job, model, windows["pool"], moments, reporter)
    return moments, statistics, stages.stage_search(job, model, statistics, moments, windows["objective"], reporter)


@contextlib.contextmanager
def _saying_what_is_kept(job: Job, reporter: Reporter) -> Iterator[None]:
    """Turns failures of the machine into one line.

    Raises:
        AdaPrunerError: in their place.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        failure = describe_failure(error, _what_takes_less(job, reporter.current))
        if failure is None:
            raise
        raise AdaPrunerError(
            f"{reporter.current}: {failure}. What was done before is kept in {job.run.path}: the same command goes on,"
            " without --overwrite"
        ) from error


def _what_takes_less(job: Job, stage: str) -> str:
    """What the user can do where a stage has run out of memory."""
    if stage == "recovering":
        return f"adapruner recover {job.run.model} with a smaller --micro-batch-size takes less"
    if not job.layer_wise and job.location.gguf_file is None:
        return "--layer-wise takes less"
    return "--dtype bfloat16 and a smaller --pool take less, in another run"
