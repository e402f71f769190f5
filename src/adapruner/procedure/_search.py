"""What is removed: the search, and the plan of the candidate that it chooses."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor
from transformers import PreTrainedModel

from adapruner.artifacts import Form, artifact
from adapruner.calibration import upper_case_windows
from adapruner.config import TARGET_OPTIONS, PruneConfig, WholePart
from adapruner.errors import AdaPrunerError, NonFiniteError
from adapruner.evaluation import compute_prefix, log_probabilities, losses_by_batch
from adapruner.job import Job
from adapruner.measurement import HeldMoments, InputMoments, Statistics
from adapruner.memory import TOKENS_FOR_COSTS, TOKENS_FOR_WHOLE, windows_of
from adapruner.models import Whole, in_fastest_dtype
from adapruner.planning import MOST_CHANNELS, PruningPlan, kept_counts, largest_channel_share
from adapruner.procedure._forms import Windows, json_form
from adapruner.procedure._statistics import Moments, moments, statistics
from adapruner.procedure._windows import usable, windows
from adapruner.progress import Advance
from adapruner.search import (
    MOST_PROTECTED_FIRST,
    MOST_WHOLE,
    Candidate,
    Levelled,
    Objective,
    RemovalOrders,
    Search,
    SearchResult,
    SearchSpace,
    TriedPoint,
    build_subset_family,
    level,
    meet_budget,
    plan_candidate,
    removal_orders,
)
from adapruner.structure import Structure
from adapruner.surgery import Compensation

# What decides how much is removed; a ratio alone leaves the others as they are.
BUDGET = " ".join(("ratio", *TARGET_OPTIONS))
PLAN: Form[PruningPlan] = Form(PruningPlan.save, PruningPlan.load)


def _may_remove_whole(config: PruneConfig) -> bool:
    return config.space == "extended" and config.search == "joint" and config.whole != ("none",)


def _whole_parts(job: Job) -> list[Whole]:
    """What of a layer the search may remove whole.

    Raises:
        AdaPrunerError: the options name a part that no layer of this model can lose.
    """
    config, structure = job.config, job.prepared.structure
    by_default: tuple[WholePart, ...] = ("layer",) if config.layout == "uniform" else ("attention",)
    for part in config.whole or ():
        if part not in structure.whole:
            possible = ", ".join(sorted(structure.whole)) or "none"
            raise AdaPrunerError(
                f"`whole` {part}: models of the family {structure.model_type} cannot lose it; possible: {possible}"
            )
    return [part for part in get_args(Whole) if part in structure.whole and part in (config.whole or by_default)]


def _prunable(job: Job) -> range:
    """The layers that the options do not protect."""
    config = job.config
    return range(config.protect_first or 0, job.prepared.structure.layers - (config.protect_last or 0))


@artifact(
    "whole.json",
    json_form(RemovalOrders),
    inputs=(windows,),
    options="whole layout space search protect_first protect_last",
    leaves="model family precision left_out",
    is_wanted=_may_remove_whole,
    check=_whole_parts,
    is_result=False,
    version=2,
)
def whole(job: Job, work: Path, windows: Windows) -> RemovalOrders:
    """In which order attentions, feed-forwards and layers are removed whole."""
    prepared, config = job.prepared, job.config
    structure, parts = prepared.structure, _whole_parts(job)
    candidates = {part: sorted(structure.whole_parameters(part).keys() & set(_prunable(job))) for part in parts}
    text = usable(job, windows)["pool"][: windows_of(TOKENS_FOR_WHOLE, config)]
    with prepared.reporter.stage("removing parts whole", MOST_WHOLE * len(parts)) as advance:
        return removal_orders(in_fastest_dtype(prepared.dense), structure, text, candidates, advance)


@artifact(
    "search.json",
    json_form(SearchResult),
    inputs=(windows, moments, statistics, whole),
    options="searched_ratio searched_target ratio_of samples objective_windows objective_function selection trials"
    " sampler search alignment terms reduction space layout whole protect_first protect_last head_granularity"
    " expert_granularity head_share round_to compensation seed",
    leaves="model family precision left_out terms",
    check=lambda job: (
        job.prepared.check_storage(),
        job.prepared.check_objective(),
        job.budget(job.config.searched_ratio),
    ),
    is_shared=True,
    version=7,
)
def search(
    job: Job, work: Path, windows: Windows, moments: Moments, statistics: Statistics, orders: RemovalOrders | None
) -> SearchResult | None:
    """The search; of several processes, the first leads it and the others run trials."""
    prepared, config = job.prepared, job.config
    fast, text = in_fastest_dtype(prepared.dense), usable(job, windows)["objective"]
    if not all(losses.isfinite().all() for losses in losses_by_batch(fast, text)):
        raise NonFiniteError("the loss of the model is not finite on the text of the objective")
    judge = partial(_judge, job, fast, _held(job, moments, "searching"), statistics)
    scoring = config.scoring_count(len(text))
    search = _search(job, statistics, orders, judge(text[:scoring]))
    if not prepared.process.leads:
        with prepared.reporter.stage("running trials"):
            search.help()
        return None
    with prepared.reporter.stage("searching", config.trials) as advance:
        search.run(partial(_report_trial, job, advance))
        further = text[scoring:]
        if not len(further) or prepared.item_losses:
            return search.result()
        changed = upper_case_windows(further, prepared.tokenizer)
        # Without tokens that the model has no embedding for, where a tokenizer has such.
        changed = changed[changed.amax(1) < prepared.empty.config.vocab_size]
        if not len(changed):
            return search.result(judge(further))
        # Only if a finalist is ahead of the best starting point.
        objective = cache(partial(judge, changed))
        return search.result(judge(further), lambda candidate: objective()(candidate))


def _report_trial(job: Job, advance: Advance, trial: TriedPoint, best: float) -> None:
    advance(1, text=f"best {'objective' if job.config.objective_function else job.config.selection} {best:.4f}")
    for callback in job.prepared.callbacks:
        callback.on_trial(trial)


def _search(job: Job, statistics: Statistics, orders: RemovalOrders | None, judge: Objective) -> Search:
    config, structure, budget = job.config, job.prepared.structure, job.budget(job.config.searched_ratio)
    fixed = [name for name in ("protect_first", "protect_last", "head_share") if getattr(config, name) is not None]
    space = SearchSpace(
        subsets=build_subset_family(statistics, structure, kept_counts(structure, budget)),
        samples=config.samples,
        seed=config.seed,
        budget=budget,
        name=config.space,
        fixed_allocation=frozenset(fixed),
        alignment=config.alignment,
        reduction=config.reduction,
        terms=config.terms,
        searched=config.search,
        meet=partial(meet_budget, structure, statistics, job.prepared.searched_target),
        experts=_what_ranks_experts(structure, statistics),
        whole=orders.shortened(structure, budget.ratio) if orders else {},
    )
    place = job.prepared.study(job.keys["search.json"])
    together = judge.together if job.prepared.layer_wise and not judge.item_losses else None
    # A function of the user gives the losses of all items at once.
    stops = not judge.item_losses
    return Search(space, judge, config.trials, config.seed, place, config.sampler, stops, together)


def _what_ranks_experts(structure: Structure, statistics: Statistics) -> Literal["none", "routing", "taylor"]:
    if not structure.has_experts:
        return "none"
    is_known = statistics.routed_share is not None and bool(statistics.routed_share.any())
    return "routing" if is_known else "taylor"


def _held(job: Job, moments: Moments, stage: str) -> HeldMoments | None:
    """The moments for a stage that uses them many times."""
    return None if moments is None else HeldMoments(moments, job.prepared.room_for_moments(stage))


def _judge(
    job: Job, fast: PreTrainedModel, moments: HeldMoments | None, statistics: Statistics, windows: Tensor
) -> Objective:
    config, structure, reused = job.config, job.prepared.structure, 0
    compensation = compensation_of(config, moments)
    if item_losses := job.prepared.item_losses:
        return Objective(fast, structure, statistics, windows, compensation, item_losses=item_losses)
    if config.layout == "per-layer":
        reused = min(structure.layers, max(MOST_PROTECTED_FIRST, config.protect_first or 0))
    return Objective(
        fast,
        structure,
        statistics,
        windows,
        compensation,
        compute_prefix(fast, windows, reused) if reused else None,
        log_probabilities(fast, windows) if config.selection == "kl" else None,
    )


def compensation_of(config: PruneConfig, moments: Mapping[int, InputMoments] | None) -> Compensation | None:
    """How the remaining weights are corrected; None if they are not."""
    return None if config.compensation == "none" or moments is None else Compensation(config.compensation, moments)


def _check_levelling(job: Job) -> None:
    if not job.prepared.level_rounds:
        return
    job.prepared.check_objective()
    if job.prepared.layer_wise:
        raise AdaPrunerError("levelling needs all layers in memory: set `level_rounds` 0 with `layer_wise`")


@artifact(
    "levelled.json",
    json_form(Levelled),
    inputs=(windows, moments, statistics, search),
    options=f"{BUDGET} level_rounds",
    leaves="model family precision left_out",
    is_wanted=lambda config: config.levels_widths,
    check=_check_levelling,
    is_result=False,
    version=4,
)
def levelled(
    job: Job, work: Path, windows: Windows, moments: Moments, statistics: Statistics, search: SearchResult
) -> Levelled:
    """The chosen candidate at the ratio, with whole parts kept that are worth it and its widths levelled: costs are
    measured on the pool, and the windows of the objective decide what is accepted. A given share of heads stays, and
    layers that the options protect do."""
    prepared, config, text = job.prepared, job.config, usable(job, windows)
    candidate, rounds = candidate_at_ratio(job, statistics, search.best), prepared.level_rounds
    if not rounds:
        return Levelled(candidate=candidate, moves=())
    fast, pool = in_fastest_dtype(prepared.dense), text["pool"][: windows_of(TOKENS_FOR_COSTS, config)]
    compensation = compensation_of(config, _held(job, moments, "levelling widths"))
    objective = Objective(
        fast, prepared.structure, statistics, text["objective"], compensation, item_losses=prepared.item_losses
    )
    layers, moves_heads = _prunable(job), config.head_share is None
    measured = sum(
        block.layer in layers
        and (moves_heads if block.kind == "heads" else block.kind == "channels" and not block.experts)
        for block in prepared.structure.blocks
    )
    meet = partial(meet_budget, prepared.structure, statistics, prepared.target)
    with prepared.reporter.stage("levelling widths", measured * rounds) as advance:
        return level(objective, pool, candidate, rounds, meet, layers, moves_heads, advance)


@artifact(
    "plan.json",
    PLAN,
    inputs=(statistics, search, levelled),
    options=f"{BUDGET} level_rounds",
    check=lambda job: job.budget(job.config.ratio[0]),
)
def plan(job: Job, work: Path, statistics: Statistics, search: SearchResult, levelled: Levelled | None) -> PruningPlan:
    """The plan of the chosen candidate."""
    # Widths that were moved may cost something else.
    candidate = candidate_at_ratio(job, statistics, levelled.candidate if levelled else search.best)
    return plan_candidate(job.prepared.structure, statistics, candidate)


def candidate_at_ratio(job: Job, statistics: Statistics, found: Candidate) -> Candidate:
    """A candidate at the ratio of the job, or at the one with which it meets the target. If its allocation cannot, or
    only by removing more than `MOST_CHANNELS` of a layer: with the allocation that the job starts from."""
    structure, ratio = job.prepared.structure, job.prepared.ratio_of_blocks(job.config.ratio[0])
    at_ratio = found.model_copy(update={"budget": replace(found.budget, ratio=ratio)})
    with contextlib.suppress(AdaPrunerError):
        met = meet_budget(structure, statistics, job.prepared.target, at_ratio)
        if met == found:
            return found
        if met is not None:
            plan = plan_candidate(structure, statistics, met)
            if largest_channel_share(structure, [len(block.kept) for block in plan.blocks]) <= MOST_CHANNELS:
                return met
    return found.model_copy(update={"budget": job.budget(job.config.ratio[0])})
