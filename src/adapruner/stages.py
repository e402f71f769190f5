"""The stages of a run: each takes up what the run folder holds of it, does the rest, and leaves it there."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.calibration import SELF_GENERATED, generate_windows
from adapruner.checkpoint import model_card, save_checkpoint, write_card
from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import log_probabilities, measure_perplexity, measure_tasks
from adapruner.job import MOST_CHANNELS, Job, needs_moments, reference_budget, window_counts
from adapruner.measurement import (
    Statistics,
    StoredMoments,
    measure_in_parts,
    measure_moments,
    moments_passes,
    removal_errors,
)
from adapruner.models import empty_model, find_model, in_fastest_dtype, load_config, load_model
from adapruner.planning import PruningPlan, kept_counts, largest_channel_share
from adapruner.progress import Reporter
from adapruner.recovery import read_record, recover_into, total_steps, window_examples
from adapruner.result import SearchOutcome
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


def stage_load(job: Job, reporter: Reporter) -> PreTrainedModel:
    """The dense model."""
    with reporter.stage("loading", 1) as advance:
        model = load_model(job.location, job.config.dtype, job.config.device)
        advance()
    return model


def stage_windows(job: Job, model: PreTrainedModel, reporter: Reporter) -> dict[str, Tensor]:
    """The windows of every use, kept in the run folder; the model writes those that it shall write."""
    if job.run.windows.is_file():
        return load_file(job.run.windows)
    windows = dict(job.windows)
    for number, (use, count) in enumerate(window_counts(job.config).items()):
        if use not in windows:
            with reporter.stage(f"writing {use}", 1) as advance:
                length = job.config.recovery.seq_len if use == "recovery" else job.config.seq_len
                windows[use] = generate_windows(model, count, length, 4 * job.config.seed + number)
                advance()
    job.run.save_windows(windows)
    return windows


def stage_moments(
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


def stage_measure(
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


def stage_search(
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


def stage_plan(job: Job, statistics: Statistics, outcome: SearchOutcome) -> PruningPlan:
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


def stage_save(
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


def stage_recover(
    job: Job, model: PreTrainedModel, windows: dict[str, Tensor], reporter: Reporter
) -> dict[str, Any] | None:
    """Trains the saved model again, on the text or on what the dense model predicts; returns the record of it."""
    config, run = job.config, job.run
    if config.recover is None:
        return None
    record = read_record(run.recovered)
    if record is None:
        examples = job.examples or window_examples(windows["recovery"], config.recover, config.recovery)
        pruned = load_model(find_model(str(run.model)), "auto", config.device)
        # Of text that the model wrote itself there is nothing to learn but its predictions.
        of_model = config.recover == SELF_GENERATED
        teacher = None if config.recovery.learns_labels(examples.instructions, of_model) else model
        about = {"model": config.model, "data": config.recover, **config.recovery.model_dump(mode="json")}
        try:
            with reporter.stage("recovering", total_steps(examples, config.recovery)) as advance:
                record = recover_into(
                    run.recovered, pruned, job.tokenizer, examples, config.recovery, teacher, about, progress=advance
                )
        except AdaPrunerError as error:
            raise AdaPrunerError(
                f"{error}. The pruned model is whole: adapruner recover {run.model} trains it with other options"
            ) from None
    return record


def stage_evaluate(
    job: Job, model: PreTrainedModel, fixed_plan: PruningPlan, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Perplexity, by model and text: of the dense model, of the best fixed metric's cut, of the saved checkpoints."""
    if not job.report:
        return {}

    def measure(evaluated: PreTrainedModel, advance: Callable[..., None]) -> dict[str, Any]:
        return {
            name: measure_perplexity(evaluated, text.windows, name, advance, provenance=text.provenance).as_json()
            for name, text in job.report.items()
        }

    models = _models_to_evaluate(job, model, fixed_plan)
    windows = sum(len(text.windows) for text in job.report.values())
    return _evaluate_each(job, "perplexity", models, measure, windows, reporter)


def stage_tasks(job: Job, model: PreTrainedModel, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Scores of lm-eval's tasks, by model and task: of the dense model and of the saved checkpoints."""
    tasks = job.tasks
    if tasks is None:
        return {}

    def measure(evaluated: PreTrainedModel, advance: Callable[..., None]) -> dict[str, Any]:
        scores = measure_tasks(in_fastest_dtype(evaluated), job.tokenizer, tasks, advance)
        return {score.task: score.as_json() for score in scores}

    return _evaluate_each(job, "tasks", _models_to_evaluate(job, model), measure, len(tasks), reporter)


def _models_to_evaluate(
    job: Job, model: PreTrainedModel, fixed_plan: PruningPlan | None = None
) -> dict[str, Callable[[], PreTrainedModel]]:
    def saved(folder: Path) -> Callable[[], PreTrainedModel]:
        return lambda: load_model(find_model(str(folder)), "auto", job.config.device)

    models: dict[str, Callable[[], PreTrainedModel]] = {"dense": lambda: model}
    if fixed_plan is not None:
        models["best_fixed"] = lambda: prune_model(model, job.structure, fixed_plan)
    models["searched"] = saved(job.run.model)
    if job.config.recover:
        models["recovered"] = saved(job.run.recovered)
    return models


def _evaluate_each(
    job: Job,
    kind: str,
    models: dict[str, Callable[[], PreTrainedModel]],
    measure: Callable[[PreTrainedModel, Callable[..., None]], dict[str, Any]],
    steps: int,
    reporter: Reporter,
) -> dict[str, dict[str, Any]]:
    """Measures one model after the other; what was measured of one is kept, should the next one fail."""
    path = job.run.evaluation
    kept: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text()) if path.is_file() else {}
    done = kept.setdefault(kind, {})
    with reporter.stage({"perplexity": "evaluating", "tasks": "running tasks"}[kind], steps * len(models)) as advance:
        for name, make in models.items():
            if name in done:
                advance(steps)
            else:
                done[name] = measure(make(), advance)
                job.run.save_json(kept, path)
    return done


def count_saved_parameters(folder: Path) -> int:
    """Counted in the checkpoint itself, without reading its weights."""
    return build_structure(empty_model(load_config(find_model(str(folder))))).total_parameters


def write_cards(job: Job, plan: PruningPlan, result: dict[str, Any]) -> None:
    """The model cards, once all is measured."""
    config = load_config(find_model(str(job.run.model)))
    write_card(job.run.model, model_card(job.location, config, plan, result))
    if job.config.recover:
        write_card(job.run.recovered, model_card(job.location, config, plan, result, of="recovered"))
