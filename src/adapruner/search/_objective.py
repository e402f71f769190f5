"""What a trial costs the model: from a candidate to a plan, a cut model, and its loss on held-out windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from adapruner.evaluation import Prefix, losses_by_batch
from adapruner.importance import score_groups
from adapruner.measurement import Statistics
from adapruner.planning import BudgetError, PruningPlan, kept_counts, make_plan
from adapruner.search._space import Candidate
from adapruner.structure import Structure
from adapruner.surgery import Compensation, prune_model


def plan_candidate(structure: Structure, statistics: Statistics, candidate: Candidate) -> PruningPlan:
    """The plan that a candidate leads to.

    Args:
        statistics: of the whole pool.

    Raises:
        BudgetError: its budget cannot be met.
    """
    scores = scores_of(structure, statistics, candidate)
    return make_plan(structure, scores, kept_counts(structure, candidate.budget, scores))


def is_feasible(structure: Structure, statistics: Statistics, candidate: Candidate) -> bool:
    """Whether the budget of a candidate can be met; see `plan_candidate`."""
    scores = scores_of(structure, statistics, candidate) if candidate.budget.ranking == "global" else None
    try:
        kept_counts(structure, candidate.budget, scores)
    except BudgetError:
        return False
    return True


def scores_of(structure: Structure, statistics: Statistics, candidate: Candidate) -> Tensor:
    """[groups]: the importance that a candidate gives every group."""
    return score_groups(statistics.select(candidate.samples), structure, candidate.point)


@dataclass(frozen=True)
class Objective:
    """What a candidate leaves of the model, window by window; no trial does a backward pass.

    Attributes:
        windows: [windows, tokens], int64, disjoint from the pool and from everything that is reported.
        compensation: how the cut model is compensated before it is judged.
        prefix: what comes out of the first layers of the model, which a trial that does not cut them takes from here.
        references: for the selection by divergence, the dense model's log-probabilities, batch by batch (see
            `evaluation.losses_by_batch`); None to select by the loss.
    """

    model: PreTrainedModel
    structure: Structure
    statistics: Statistics
    windows: Tensor
    compensation: Compensation | None = None
    prefix: Prefix | None = None
    references: list[Tensor] | None = None

    def __call__(self, candidate: Candidate) -> Iterator[Tensor]:
        """[windows of one batch], float64, batch after batch: the loss of the cut model, or its divergence from the
        dense one, in nats per predicted token."""
        plan = plan_candidate(self.structure, self.statistics, candidate)
        pruned = prune_model(self.model, self.structure, plan, self.compensation)
        cut = [block.layer for block in plan.blocks if len(block.kept) < block.groups]
        yield from losses_by_batch(
            pruned, self.windows, self.references, prefix=self.prefix, prefix_layers=min(cut, default=0)
        )
