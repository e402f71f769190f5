"""The objective of the search: from a candidate to a plan, a cut model, and its loss on held-out windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from torch import Tensor
from transformers import PreTrainedModel

from adapruner.evaluation._losses import Prefix, losses_by_batch, losses_in_step
from adapruner.importance._metric import score_groups
from adapruner.measurement._moments import InputMoments
from adapruner.measurement._statistics import Statistics
from adapruner.models._layers import is_streamed
from adapruner.planning._budget import MOST_CHANNELS, Budget, BudgetError, kept_counts, largest_channel_share
from adapruner.planning._plan import PruningPlan, make_plan
from adapruner.search._space import Candidate
from adapruner.structure._blocks import Structure
from adapruner.surgery._cut import prune_model, prune_on_reading

# Candidates that are judged together, if that is cheaper.
JUDGED_TOGETHER = 4


def plan_candidate(structure: Structure, statistics: Statistics, candidate: Candidate) -> PruningPlan:
    """The plan that a candidate leads to, from the statistics of the whole pool."""
    scores = scores_of(structure, statistics, candidate)
    return make_plan(structure, scores, kept_counts(structure, candidate.budget))


def at_budget(structure: Structure, candidate: Candidate, budget: Budget) -> Candidate:
    """A candidate at the ratio of a budget. If its allocation cannot meet that, or only by removing more than
    `MOST_CHANNELS` of a layer: with the allocation of the budget."""
    moved = candidate.with_budget(replace(candidate.budget, ratio=budget.ratio))
    with suppress(BudgetError):
        share = largest_channel_share(structure, kept_counts(structure, moved.budget))
        if moved == candidate or share <= MOST_CHANNELS:
            return moved
    return candidate.with_budget(budget)


def scores_of(structure: Structure, statistics: Statistics, candidate: Candidate) -> Tensor:
    """[groups]: the importance that a candidate gives every group."""
    return score_groups(statistics.select(candidate.samples), structure, candidate.point)


@dataclass(frozen=True)
class Objective:
    """The increase of the loss over the dense model's in the model that a candidate leaves, window by window; no trial
    does a backward pass.

    Attributes:
        windows: [windows, tokens], int64, disjoint from the pool and from everything that is reported.
        compensation: second moments by which the cut model is compensated before it is judged; None for none.
        prefix: the outputs of the first layers of the model, which trials that do not cut these layers reuse.
        dense_losses: [windows], float64: the losses of the dense model.
    """

    model: PreTrainedModel
    structure: Structure
    statistics: Statistics
    windows: Tensor
    dense_losses: Tensor
    compensation: Mapping[int, InputMoments] | None = None
    prefix: Prefix | None = None
    # By the hash of a plan: candidates may differ in values without effect, as the samples of unweighted terms.
    _judged: dict[str, list[Tensor]] = field(default_factory=dict, init=False)

    def __call__(self, candidate: Candidate) -> Iterator[Tensor]:
        """[windows of one batch], float64, batch after batch: the increase in nats per predicted token."""
        plan = plan_candidate(self.structure, self.statistics, candidate)
        if is_streamed(self.model):
            yield from self._in_step([plan])[0]
            return
        if plan.hash in self._judged:
            yield from self._judged[plan.hash]
            return
        pruned = prune_model(self.model, self.structure, plan, self.compensation)
        judged = []
        losses = losses_by_batch(pruned, self.windows, prefix=self.prefix, prefix_layers=_first_cut([plan]))
        for increases in self._over_dense(losses):
            judged.append(increases)
            yield increases
        self._judged[plan.hash] = judged

    def together(self, candidates: Sequence[Candidate]) -> list[Iterable[Tensor]]:
        """The same for several candidates: of a model whose layers are streamed, every layer is read once for all."""
        plans = {}
        for number, candidate in enumerate(candidates):
            with suppress(BudgetError):
                plans[number] = plan_candidate(self.structure, self.statistics, candidate)
        losses = dict(zip(plans, self._in_step(list(plans.values())), strict=True))
        return [losses[number] if number in plans else self(candidate) for number, candidate in enumerate(candidates)]

    def _in_step(self, plans: Sequence[PruningPlan]) -> list[list[Tensor]]:
        models = [prune_on_reading(self.model, self.structure, plan, self.compensation) for plan in plans]
        of_models = losses_in_step(self.model, models, self.windows, self.prefix, _first_cut(plans))
        return [[*self._over_dense(losses)] for losses in of_models]

    def _over_dense(self, losses: Iterable[Tensor]) -> Iterator[Tensor]:
        """The losses of batches, less those of the dense model."""
        begin = 0
        for batch in losses:
            yield batch - self.dense_losses[begin : begin + len(batch)]
            begin += len(batch)


def _first_cut(plans: Sequence[PruningPlan]) -> int:
    """The first layer that one of the plans cuts."""
    return min((block.layer for plan in plans for block in plan.blocks if len(block.kept) < block.groups), default=0)
