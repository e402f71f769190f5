"""The whole job as a list of stages; each reads and writes the run folder, so that the same call goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapruner import stages
from adapruner.checkpoint import check_push, push
from adapruner.config import PruneConfig, read_recipe
from adapruner.errors import AdaPrunerError
from adapruner.job import Job, prepare
from adapruner.progress import Reporter
from adapruner.result import PruneResult, build_result, read_result
from adapruner.run_folder import RunFolder


def prune(
    model: str | None,
    output: str | Path,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    recipe: str | Path | None = None,
    **options: Any,
) -> PruneResult:
    """Makes a causal language model smaller: measures, searches, cuts, saves, trains again if asked to, and evaluates.

    The same call again goes on where an earlier one stopped.

    Args:
        model: hub id, model folder, `.gguf` file, or `smollm2`; None takes that of the recipe.
        output: the run folder; the pruned model is in its `model/`, the one trained afterwards in `recovered/`.
        overwrite: start again where the folder holds a run of another config.
        push_to_hub: upload the model, recovered if it was, to this repository, `owner/name`.
        recipe: options to start from, by the name of a recipe of this package or a YAML file; others go before them.
        options: the fields of `PruneOptions`.

    Raises:
        AdaPrunerError: an option, the model, the text or the folder will not do; before any long work.
    """
    config = _config(model, recipe, options)
    run = RunFolder(Path(output))
    run.check(config, overwrite)
    if push_to_hub:
        check_push(push_to_hub)
    if overwrite or not run.result.is_file():
        job = prepare(config, run, run.windows if not overwrite else None)
        run.create(config, overwrite)
        _run_stages(job)
    if push_to_hub:
        push(run.recovered if config.recover else run.model, push_to_hub)
    return read_result(run)


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
    earlier, run = RunFolder(Path(source)), RunFolder(Path(output))
    if run.path.resolve() == earlier.path.resolve():
        raise AdaPrunerError(f"{output} is the earlier run itself: choose another output")
    if not earlier.search.is_file():
        raise AdaPrunerError(f"{source} holds no finished search: run adapruner prune first")
    options = PruneConfig.load(earlier.config).model_dump() | {"ratio": ratio}
    config = PruneConfig.from_options(**options)
    run.check(config, overwrite)
    if not overwrite and run.result.is_file():
        return read_result(run)
    job = prepare(config, run, earlier.windows)
    run.create(config, overwrite)
    run.take_over(earlier)
    return _run_stages(job)


def _run_stages(job: Job) -> PruneResult:
    reporter = Reporter(job.run.log)
    model = stages.stage_load(job, reporter)
    windows = stages.stage_windows(job, model, reporter)
    moments = stages.stage_moments(job, model, windows, reporter)
    statistics = stages.stage_measure(job, model, windows["pool"], moments, reporter)
    outcome = stages.stage_search(job, model, statistics, moments, windows["objective"], reporter)
    plan = stages.stage_plan(job, statistics, outcome)
    fixed_plan = stages.plan_at_ratio(job.structure, statistics, outcome.best_fixed, job.config)
    del statistics
    stages.stage_save(job, model, plan, moments, windows, reporter)
    recovery = stages.stage_recover(job, model, windows, reporter)
    perplexities = stages.stage_evaluate(job, model, fixed_plan, reporter)
    scores = stages.stage_tasks(job, model, reporter)
    parameters = stages.count_saved_parameters(job.run.model)
    finished = reporter.finished_stages()
    result = build_result(job.config, plan, parameters, outcome, recovery, perplexities, scores, finished)
    stages.write_cards(job, plan, result)
    job.run.save_json(result, job.run.result)
    return read_result(job.run)
