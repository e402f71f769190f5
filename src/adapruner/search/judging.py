"""What cuts cost on text: of each block alone, from which follows how much each loses, and of whole candidates."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapruner.budget.counts import ByCost
from adapruner.budget.plan import PruningPlan, make_plan
from adapruner.evaluation.losses import compute_prefix, log_probabilities, losses_by_batch
from adapruner.importance import score_groups
from adapruner.measurement.moments import InputMoments
from adapruner.measurement.taylor import Statistics
from adapruner.model.layers import loaded_layer
from adapruner.search.space import Candidate
from adapruner.structure.blocks import Block, Structure
from adapruner.surgery import prune_model

# Every fourth prediction is compared: neighbours tell much the same, and a large vocabulary costs more than the layers.
_COMPARED = slice(None, None, 4)
# Tokens of held-out text on which the costs of blocks are measured.
TOKENS_FOR_COSTS = 2048
# From so many feed-forwards on, every second is measured (research/experiments/costs.md).
_MANY = 20
# A model that is broken by a cut; a cut that costs nothing.
_BROKEN, _NOTHING = 1e6, 1e-9


class Cost(BaseModel, extra="forbid", frozen=True):
    """What one cut costs.

    Attributes:
        kept: number of groups that the block keeps.
        nats: divergence of the model in which that block alone is cut and compensated from the dense model, per
            predicted token.
        standard_error: over the windows; None if there is only one.
    """

    kept: int
    nats: float
    standard_error: float | None


class Costs(BaseModel, extra="forbid", frozen=True):
    """The cost of one cut of each block that was measured, by the number of the block."""

    by_block: dict[int, Cost]

    def of_groups(self, structure: Structure, errors: Tensor) -> Tensor:
        """[groups], float64, in nats per token: what each group adds when those of its block are removed one after the
        other. Costs grow with the error of the output, so one cut of a block gives all; a block that was not measured
        costs what its neighbours do; and few tokens decide a cost, so only half of its distance from the median of
        such blocks counts, all in logarithms (research/experiments/costs.md).

        Args:
            errors: [groups], by which the groups of a block are ranked (`tempered_error`).
        """
        costs = errors.double().clone()
        for kind in {structure.blocks[number].kind for number in self.by_block}:
            blocks = {number: block for number, block in enumerate(structure.blocks) if block.kind == kind}
            measured = {number: cost for number, cost in self.by_block.items() if number in blocks}
            median = statistics.median(cost.nats for cost in measured.values())
            for number, block in blocks.items():
                before = [other for other in measured if other <= number]
                after = [other for other in measured if other >= number]
                nearest = [*before[-1:], *after[:1]]  # twice the block itself if it was measured
                nats = statistics.geometric_mean(max(measured[other].nats, _NOTHING) for other in nearest)
                share = 1 - measured[nearest[0]].kept / blocks[nearest[0]].groups
                removed = round(share * block.groups / block.strata)
                own = costs[structure.group_offsets[number] : structure.group_offsets[number + 1]]
                error = own.view(block.strata, -1).sort(1).values[:, :removed].sum()
                own *= math.sqrt(nats * median) / error.clamp_min(torch.finfo(torch.float32).tiny)
        return costs


def cuts_to_measure(structure: Structure, allocation: ByCost) -> dict[int, int]:
    """By block, the number of groups that it keeps in the cut whose cost is measured: none of an attention that may be
    removed whole, half of others. Of many feed-forwards of one size, every second is measured: over many layers, costs
    rise and fall slowly; those of attentions do not."""

    def kept(block: Block) -> int:
        if allocation.may_remove(structure, block):
            return 0
        half = block.strata * round(block.groups / block.strata / 2)
        return max(half, block.strata * math.ceil(max(block.least, 1) / block.strata))

    blocks = allocation.cut_blocks(structure)
    cuts = {number: kept(block) for number, block in blocks.items()}
    cuts = {number: count for number, count in cuts.items() if count < blocks[number].groups}
    channels = [number for number in cuts if blocks[number].kind == "channels"]
    sizes = {(blocks[number].groups, blocks[number].parameters_per_group) for number in channels}
    skipped = {*channels[1::2]} if len(channels) >= _MANY and len(sizes) == 1 else set[int]()
    return {number: count for number, count in cuts.items() if number not in skipped}


@torch.inference_mode()
def measure_costs(
    model: PreTrainedModel,
    structure: Structure,
    errors: Tensor,
    compensation: Mapping[int, InputMoments] | None,
    windows: Tensor,
    cuts: Mapping[int, int],
    progress: Callable[[int], None] | None = None,
) -> Costs:
    """Cuts one block after the other, and compares with the dense model. The layers before a block are not computed
    again.

    Args:
        errors: [groups], by which the groups of a block are ranked.
        windows: [windows, tokens], int64.
        cuts: by number of the block, how many groups it keeps.
        progress: called with 1 after every block.
    """
    prefix, by_block = compute_prefix(model, windows, structure.layers), dict[int, Cost]()

    def after(index: int, layer: nn.Module, states: Iterable[Tensor]) -> list[Tensor]:
        return [calls[index].run(layer, state) for calls, state in zip(prefix.calls, states, strict=True)]

    def predictions(states: Iterable[Tensor]) -> list[Tensor]:
        calls = (call for call, *_ in prefix.calls)
        return [log_probabilities(model, state[:, _COMPARED], call) for state, call in zip(states, calls, strict=True)]

    dense = [(p.exp(), (p.exp() * p).sum(-1)) for p in predictions(states[-1] for states in prefix.states)]
    for index in range(structure.layers):
        states = {}
        for number in (number for number in cuts if structure.blocks[number].layer == index):
            counts = [block.groups for block in structure.blocks]
            counts[number] = cuts[number]
            alone = prune_model(model, structure, make_plan(structure, errors, counts), compensation)
            with loaded_layer(model, index), loaded_layer(alone, index) as layer:
                states[number] = after(index, layer, (known[index] for known in prefix.states))
        for later in range(index + 1, structure.layers if states else 0):
            with loaded_layer(model, later) as layer:
                states = {number: after(later, layer, own) for number, own in states.items()}
        for number, own in states.items():
            pairs = zip(dense, predictions(own), strict=True)
            divergence = torch.cat([(known - torch.linalg.vecdot(p, q)).double().mean(1) for (p, known), q in pairs])
            error = float(divergence.std()) / math.sqrt(len(divergence)) if len(divergence) > 1 else None
            # A divergence of nothing may come out below it.
            cost = Cost(kept=cuts[number], nats=max(0.0, float(divergence.mean())), standard_error=error)
            is_finite = bool(divergence.isfinite().all())
            by_block[number] = cost if is_finite else Cost(kept=cuts[number], nats=_BROKEN, standard_error=None)
            if progress:
                progress(1)
    return Costs(by_block=by_block)


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
        plan = plan_candidate(self.structure, self.statistics, candidate, self.counts)
        if plan.hash in self._judged:
            yield from self._judged[plan.hash]
            return
        cut = prune_model(self.model, self.structure, plan, self.compensation)
        judged, begin = list[Tensor](), 0
        for losses in losses_by_batch(cut, self.windows):
            judged.append(losses - self.dense_losses[begin : begin + len(losses)])
            begin += len(losses)
            yield judged[-1]
        self._judged[plan.hash] = judged
