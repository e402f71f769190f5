"""The whole job as a list of stages; each reads and writes the run folder, so that the same call goes on."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.calibration import generate_windows
from adapruner.checkpoint import check_push, model_card, push, save_checkpoint, write_card
from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import Perplexity, log_probabilities, measure_perplexity
from adapruner.job import MOST_CHANNELS, Job, needs_moments, prepare, reference_budget, window_counts
from adapruner.measurement import (
    Statistics,
    StoredMoments,
    measure_in_parts,
    measure_moments,
    moments_passes,
    removal_errors,
)
from adapruner.models import (
    empty_model,
    find_model,
    in_fastest_dtype,
    load_config,
    load_model,
)
from adapruner.planning import PruningPlan, kept_counts, largest_channel_share
from adapruner.progress import Reporter
from adapruner.result import PruneResult, SearchOutcome, build_result, read_result
from adapruner.run_folder import RunFolder
from adapruner.search import (
    Candidate,
    Objective,
    SearchSpace,
    build_subset_family,
    plan_candidate,
    search,
)
from adapruner.structure import Structure, build_structure
from adapruner.surgery import Compensation, prune_model, refit_sequentially

MEASURING_BATCH = 4


def prune(
    model: str, output: str | Path, overwrite: bool = False, push_to_hub: str | None = None, **options: Any
) -> PruneResult:
    """Makes a causal language model smaller: measures, searches, cuts, saves and evaluates.

    The same call again goes on where an earlier one stopped.

    Args:
        model: hub id, model folder, `.gguf` file, or `smollm2`.
        output: the run folder; the pruned model is in its `model/`.
        overwrite: start again where the folder holds a run of another config.
        push_to_hub: upload the pruned model to this repository, `owner/name`.
        options: the fields of `PruneOptions`.

    Raises:
        AdaPrunerError: an option, the model, the text or the folder will not do; before any long work.
    """
    config = PruneConfig.from_options(model=model, **options)
    run = RunFolder(Path(output))
    run.check(config, overwrite)
    if push_to_hub:
        check_push(push_to_hub)
    if overwrite or not run.result.is_file():
        job = prepare(config, run, run.windows if not overwrite else None)
        run.create(config, overwrite)
        _run_stages(job)
    if push_to_hub:
        push(run.model, push_to_hub)
    return read_result(run)


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
    with reporter.stage("loading", 1) as advance:
        model = load_model(job.location, job.config.dtype, job.config.device)
        advance()
    windows = _stage_windows(job, model, reporter)
    moments = _stage_moments(job, model, windows, reporter)
    statistics = _stage_measure(job, model, windows["pool"], moments, reporter)
    outcome = _stage_search(job, model, statistics, moments, windows["objective"], reporter)
    plan = _stage_plan(job, statistics, outcome)
    fixed_plan = plan_at_ratio(job.structure, statistics, outcome.best_fixed, job.config)
    del statistics
    _stage_save(job, model, plan, moments, windows, reporter)
    perplexities = _stage_evaluate(job, model, fixed_plan, reporter)
    saved = load_config(find_model(str(job.run.model)))
    parameters = build_structure(empty_model(saved)).total_parameters
    result = build_result(job.config, plan, parameters, outcome, perplexities, reporter.finished_stages())
    write_card(job.run.model, model_card(job.location, saved, plan, result))
    job.run.save_json(result, job.run.result)
    return read_result(job.run)


def _stage_windows(job: Job, model: PreTrainedModel, reporter: Reporter) -> dict[str, Tensor]:
    """The pool and objective windows, kept in the run folder; the model writes those that it shall write."""
    if job.run.windows.is_file():
        return load_file(job.run.windows)
    windows = dict(job.windows)
    for number, (use, count) in enumerate(window_counts(job.config).items()):
        if use not in windows:
            with reporter.stage(f"writing {use}", 1) as advance:
                seed = 3 * job.config.seed + number
                windows[use] = generate_windows(model, count, job.config.seq_len, seed)
                advance()
    job.run.save_windows(windows)
    return windows


def _stage_moments(
    job: Job, model: PreTrainedModel, windows: dict[str, Tensor], reporter: Reporter
) -> StoredMoments | None:
    """Second moments of all blocks, as many blocks at a time as fit into memory; those that are there stay."""
    if not needs_moments(job.config):
        return None
    run = job.run
    run.moments.mkdir(exist_ok=True)
    moments = StoredMoments(run.moments)
    missing = [index for index in range(len(job.structure.blocks)) if not moments.path(index).is_file()]
    passes = moments_passes(job.structure, missing)
    if passes:
        text, fast = windows["compensation"], in_fastest_dtype(model)
        with reporter.stage("reading activations", len(passes) * len(text)) as advance:
            for blocks in passes:
                for index, block_moments in measure_moments(
                    fast, job.structure, text, blocks, progress=advance
                ).items():
                    run.save_moments(block_moments, moments.path(index))
    return moments


def _stage_measure(
    job: Job, model: PreTrainedModel, pool: Tensor, moments: StoredMoments | None, reporter: Reporter
) -> Statistics:
    """Measures the pool part by part; parts that an earlier call finished are not measured again."""
    run = job.run
    if run.statistics.is_file():
        shutil.rmtree(run.statistics_parts, ignore_errors=True)
        return Statistics.load(run.statistics)
    run.statistics_parts.mkdir(exist_ok=True)
    parts = [run.statistics_parts / f"{start:06}.safetensors" for start in range(0, len(pool), MEASURING_BATCH)]
    done = next((index for index, part in enumerate(parts) if not part.is_file()), len(parts))
    with reporter.stage("measuring", len(pool)) as advance:
        advance(min(done * MEASURING_BATCH, len(pool)))
        measured = measure_in_parts(
            model, job.structure, pool, MEASURING_BATCH, first=min(done * MEASURING_BATCH, len(pool))
        )
        for path, part in zip(parts[done:], measured, strict=True):
            run.save_statistics(part, path)
            advance(len(part))
    statistics = Statistics.concatenate([Statistics.load(part) for part in parts])
    if moments is not None and job.config.space == "extended":
        with reporter.stage("comparing removals", len(moments)) as advance:
            alone, eliminated = removal_errors(model, job.structure, moments, advance)
        statistics = replace(statistics, removal_error=alone, elimination_error=eliminated)
    run.save_statistics(statistics, run.statistics)
    shutil.rmtree(run.statistics_parts)
    return statistics


def _stage_search(
    job: Job,
    model: PreTrainedModel,
    statistics: Statistics,
    moments: StoredMoments | None,
    windows: Tensor,
    reporter: Reporter,
) -> SearchOutcome:
    config, run = job.config, job.run
    if run.search.is_file():
        return SearchOutcome.model_validate_json(run.search.read_text())
    space = SearchSpace(
        subsets=build_subset_family(statistics, job.structure, kept_counts(job.structure, job.budget)),
        samples=config.samples,
        seed=config.seed,
        budget=job.budget,
        name=config.space,
        fixed_allocation=frozenset(
            name for name in ("protect_first", "protect_last", "head_share") if getattr(config, name) is not None
        ),
        alignment=config.alignment,
        reduction=config.reduction,
        searched=config.search,
    )
    fast = in_fastest_dtype(model)
    compensation = _compensation(job, moments)

    def judge(on: Tensor) -> Objective:
        references = log_probabilities(fast, on) if config.selection == "kl" else None
        return Objective(fast, job.structure, statistics, on, compensation, references)

    with reporter.stage("searching", config.trials) as advance:
        found = search(
            space,
            judge(windows[: config.objective_windows]),
            config.trials,
            config.seed,
            run.journal,
            config.sampler,
            progress=lambda best: advance(1, text=f"best {config.selection} {best:.4f}"),
            judge_further=judge(windows[config.objective_windows :])
            if len(windows) > config.objective_windows
            else None,
        )
    outcome = SearchOutcome(
        ratio=config.ratio,
        trials=config.trials,
        best=found.best.candidate,
        best_loss=found.best.loss,
        best_trial=found.best.trial,
        best_fixed=found.best_fixed.candidate,
        best_fixed_loss=found.best_fixed.loss,
        best_fixed_name=found.best_fixed_name,
        stopped_early=found.stopped,
    )
    run.save_json(outcome.model_dump(), run.search)
    return outcome


def _stage_plan(job: Job, statistics: Statistics, outcome: SearchOutcome) -> PruningPlan:
    if job.run.plan.is_file():
        return PruningPlan.load(job.run.plan)
    plan = plan_at_ratio(job.structure, statistics, outcome.best, job.config)
    job.run.save_plan(plan)
    return plan


def plan_at_ratio(structure: Structure, statistics: Statistics, found: Candidate, config: PruneConfig) -> PruningPlan:
    """The plan of a candidate at the ratio of a config; where the search was for another ratio, which its allocation
    cannot reach or only by taking a layer apart, with the allocation that this ratio starts from."""
    if found.budget.ratio == config.ratio:
        return plan_candidate(structure, statistics, found)
    with contextlib.suppress(AdaPrunerError):
        at_ratio = found.model_copy(update={"budget": replace(found.budget, ratio=config.ratio)})
        plan = plan_candidate(structure, statistics, at_ratio)
        if largest_channel_share(structure, [len(block.kept) for block in plan.blocks]) <= MOST_CHANNELS:
            return plan
    start = found.model_copy(update={"budget": reference_budget(config, structure)})
    return plan_candidate(structure, statistics, start)


def _compensation(job: Job, moments: StoredMoments | None) -> Compensation | None:
    form = job.config.compensation
    return None if form == "none" or moments is None else Compensation(form, moments)


def _stage_save(
    job: Job,
    model: PreTrainedModel,
    plan: PruningPlan,
    moments: StoredMoments | None,
    windows: dict[str, Tensor],
    reporter: Reporter,
) -> None:
    if job.run.model.is_dir():
        return
    compensation = _compensation(job, moments)
    pruned = prune_model(model, job.structure, plan, compensation)
    if compensation and job.fits_sequentially:
        with reporter.stage("compensating", job.structure.layers) as advance:
            text = windows["compensation"]
            refit_sequentially(model, pruned, job.structure, plan, compensation, text, advance)
    with reporter.stage("saving", 1) as advance:
        save_checkpoint(pruned, job.tokenizer, job.run.model)
        advance()


def _stage_evaluate(
    job: Job, model: PreTrainedModel, fixed_plan: PruningPlan, reporter: Reporter
) -> dict[str, dict[str, Perplexity]]:
    """Perplexity of the dense model, of the best fixed metric's cut and of the saved checkpoint, by text."""
    perplexities: dict[str, dict[str, Perplexity]] = {text: {} for text in job.report}
    total = 3 * sum(len(windows) for windows in job.report.values())
    if not total:
        return perplexities
    with reporter.stage("evaluating", total) as advance:
        models: dict[str, Callable[[], PreTrainedModel]] = {
            "dense": lambda: model,
            "best_fixed": lambda: prune_model(model, job.structure, fixed_plan),
            "searched": lambda: load_model(find_model(str(job.run.model)), "auto", job.config.device),
        }
        for name, make in models.items():
            evaluated = make()
            for text, windows in job.report.items():
                perplexities[text][name] = measure_perplexity(evaluated, windows, text, advance)
            del evaluated
    return perplexities
