"""From what was measured to a plan."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError, NonFiniteError
from adapruner.evaluation import compute_prefix, log_probabilities, losses_by_batch
from adapruner.job import MOST_CHANNELS, Job, needs_moments, reference_budget
from adapruner.measurement import Statistics, StoredMoments
from adapruner.models import in_fastest_dtype
from adapruner.planning import PruningPlan, kept_counts, largest_channel_share
from adapruner.progress import Reporter
from adapruner.search import (
    MOST_PROTECTED_FIRST,
    Candidate,
    Objective,
    Search,
    SearchResult,
    SearchSpace,
    build_subset_family,
    is_feasible,
    plan_candidate,
)
from adapruner.structure import Structure
from adapruner.surgery import Compensation


def stage_search(
    job: Job,
    model: PreTrainedModel,
    statistics: Statistics,
    moments: StoredMoments | None,
    windows: Tensor,
    reporter: Reporter,
) -> SearchResult:
    config, run = job.config, job.run
    if run.search.is_file():
        return SearchResult.model_validate_json(run.search.read_text())
    model = in_fastest_dtype(model)
    with reporter.stage("searching", config.trials) as advance:
        if not all(losses.isfinite().all() for losses in losses_by_batch(model, windows)):
            raise NonFiniteError("the loss of the model is not finite on the text of the objective")
        search = _search(job, model, statistics, moments, windows)
        search.run(progress=lambda best: advance(1, text=f"best {config.selection} {best:.4f}"))
        further = windows[config.objective_windows :]
        outcome = search.result(_judge(job, model, statistics, moments, further) if len(further) else None)
    run.save_json(outcome.model_dump(), run.search)
    return outcome


def help_searching(job: Job, model: PreTrainedModel, windows: Tensor, name: str, reporter: Reporter) -> None:
    """Runs trials beside the process that leads.

    Args:
        name: of this process, different from those of others.
    """
    statistics = Statistics.load(job.run.statistics)
    moments = StoredMoments(job.run.moments) if needs_moments(job.config) else None
    with reporter.stage("helping to search", 1) as advance:
        _search(job, in_fastest_dtype(model), statistics, moments, windows).help()
        advance()


def _search(
    job: Job, model: PreTrainedModel, statistics: Statistics, moments: StoredMoments | None, windows: Tensor
) -> Search:
    """The search of a job.

    Args:
        model: in the dtype that trials run in.
    """
    config = job.config
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
        terms=config.terms,
        searched=config.search,
        is_feasible=partial(is_feasible, job.structure, statistics),
    )
    judge = _judge(job, model, statistics, moments, windows[: config.objective_windows])
    return Search(space, judge, config.trials, config.seed, job.study, config.sampler)


def _judge(
    job: Job, model: PreTrainedModel, statistics: Statistics, moments: StoredMoments | None, windows: Tensor
) -> Objective:
    reused = 0
    if job.config.layout == "per-layer":
        reused = min(job.structure.layers, max(MOST_PROTECTED_FIRST, job.config.protect_first or 0))
    return Objective(
        model,
        job.structure,
        statistics,
        windows,
        compensation_of(job, moments),
        compute_prefix(model, windows, reused) if reused else None,
        log_probabilities(model, windows) if job.config.selection == "kl" else None,
    )


def stage_plan(job: Job, statistics: Statistics, outcome: SearchResult) -> PruningPlan:
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


def compensation_of(job: Job, moments: StoredMoments | None) -> Compensation | None:
    """How the cut model is compensated."""
    form = job.config.compensation
    return None if form == "none" or moments is None else Compensation(form, moments)
