"""The objective of the search: from a candidate to a plan, a cut model, and its loss on held-out windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from adapruner.evaluation._losses import losses_by_batch, losses_in_step
from adapruner.importance._metric import score_groups
from adapruner.measurement._moments import InputMoments
from adapruner.measurement._statistics import Statistics
from adapruner.models._layers import is_streamed
from adapruner.planning._plan import PruningPlan, make_plan
from adapruner.search._space import Candidate
from adapruner.structure._blocks import Structure
from adapruner.surgery._cut import prune_model, prune_on_reading

# Candidates that are judged together, if that is cheaper.
JUDGED_TOGETHER = 4


def plan_candidate(
    structure: Structure, statistics: Statistics, candidate: Candidate, counts: Sequence[int]
) -> PruningPlan:
    """The plan that a candidate leads to, from the statistics of the whole pool and the number of groups that blocks
    keep."""
    return make_plan(structure, score_groups(statistics.select(candidate.samples), structure, candidate.point), counts)


@dataclass(frozen=True)
class Objective:
    """The increase of the loss over the dense model's in the model that a candidate leaves, window by window; no trial
    does a backward pass.

    Attributes:
        counts: number of groups that each block keeps.
        windows: [windows, tokens], int64, disjoint from the pool and from everything that is reported.
        compensation: second moments by which the cut model is compensated before it is judged; None for none.
        dense_losses: [windows], float64: the losses of the dense model.
    """

    model: PreTrainedModel
    structure: Structure
    statistics: Statistics
    counts: Sequence[int]
    windows: Tensor
    dense_losses: Tensor
    compensation: Mapping[int, InputMoments] | None = None
    # By the hash of a plan: candidates may differ in values without effect, as the samples of unweighted terms.
    _judged: dict[str, list[Tensor]] = field(default_factory=dict, init=False)

    def __call__(self, candidate: Candidate) -> Iterator[Tensor]:
        """[windows of one batch], float64, batch after batch: the increase in nats per predicted token."""
        plan = self._plan(candidate)
        if is_streamed(self.model):
            yield from self._in_step([plan])[0]
            return
        if plan.hash in self._judged:
            yield from self._judged[plan.hash]
            return
        pruned = prune_model(self.model, self.structure, plan, self.compensation)
        judged = []
        for increases in self._over_dense(losses_by_batch(pruned, self.windows)):
            judged.append(increases)
            yield increases
        self._judged[plan.hash] = judged

    def together(self, candidates: Sequence[Candidate]) -> list[Iterable[Tensor]]:
        """The same for several candidates: of a model whose layers are streamed, every layer is read once for all."""
        return [*self._in_step([*map(self._plan, candidates)])]

    def _plan(self, candidate: Candidate) -> PruningPlan:
        return plan_candidate(self.structure, self.statistics, candidate, self.counts)

    def _in_step(self, plans: Sequence[PruningPlan]) -> list[list[Tensor]]:
        models = [prune_on_reading(self.model, self.structure, plan, self.compensation) for plan in plans]
        return [[*self._over_dense(losses)] for losses in losses_in_step(self.model, models, self.windows)]

    def _over_dense(self, losses: Iterable[Tensor]) -> Iterator[Tensor]:
        """The losses of batches, less those of the dense model."""
        begin = 0
        for batch in losses:
            yield batch - self.dense_losses[begin : begin + len(batch)]
            begin += len(batch)
