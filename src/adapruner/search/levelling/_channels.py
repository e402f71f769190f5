"""Channels that move from layers where they cost little to layers where they cost much."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

from adapruner.planning import kept_counts
from adapruner.search._objective import Objective, scores_of
from adapruner.search._space import Candidate
from adapruner.search.levelling._judging import Judged, Meet, Tried, judge
from adapruner.search.levelling._probe import Measured, Probe
from adapruner.structure import Block

# What a layer gives up more to see what its channels are worth, as a share of those it keeps: less drowns in noise.
_PROBED_SHARE = 0.15
# A layer whose channels cost twice the mean gets 2 ** 0.4 times as many, and none more than 1.3 times or less than
# 1 / 1.3 times in a round. What is removed is scaled to the ratio then, which changes narrow layers by more: a number
# of widths that meets the ratio and keeps to the limit is worth the same (docs/experiments.md).
_EXPONENT, _MOST_PER_ROUND = 0.4, 1.3
# Channels that cost nothing, or less: measured costs are noisy.
_LEAST_COST = 0.05
# Standard errors that are needed: all widths move at once, so that chance chooses less than among single changes.
_CERTAIN = 1.0


class MovedChannels(Tried):
    """What channels cost, and what it gains to move them. One standard error is needed.

    Attributes:
        costs: by layer, of the channels that would be removed next: nats of divergence from the dense model per
            predicted token and million parameters.
        standard_errors: of these, over the windows.
    """

    costs: dict[int, float]
    standard_errors: dict[int, float]


def channel_costs(
    probe: Probe, layers: range, progress: Callable[[int], None] | None
) -> Iterator[tuple[int, Measured]]:
    """By layer, the cost of its next channels (see `MovedChannels`)."""
    for number, block in _levelled_blocks(probe.objective, layers).items():
        count, step = probe.counts[number], probe.budget.round_to * block.strata
        fewer = count - step * max(1, round(_PROBED_SHARE * count / step))
        if fewer >= max(1, block.least) and (added := probe.added(number, fewer)):
            millions = (count - fewer) * block.parameters_per_group / 1e6
            yield block.layer, (added[0] / millions, added[1] / millions)
        if progress:
            progress(1)


def move_channels(
    objective: Objective, best: Judged, costs: dict[int, Measured], layers: range, meet: Meet
) -> tuple[Judged, list[MovedChannels]]:
    """The candidate with its widths changed by what they cost, if that lowers the loss on the windows of the objective,
    and what was tried."""
    judged = judge(objective, changed(objective, best.candidate, costs, layers, meet))
    if not judged:
        return best, []
    moved = MovedChannels.compared(
        best,
        judged,
        _CERTAIN,
        costs={layer: cost for layer, (cost, _) in costs.items()},
        standard_errors={layer: error for layer, (_, error) in costs.items()},
    )
    return judged if moved.accepted else best, [moved]


def changed(
    objective: Objective, candidate: Candidate, costs: dict[int, Measured], layers: range, meet: Meet
) -> Candidate | None:
    """The candidate with every layer changed by a part of what the costs say; None where they cannot be told apart, the
    budget cannot be met so, or heads and channels are ranked together."""
    structure = objective.structure
    counts = kept_counts(structure, candidate.budget, scores_of(structure, objective.statistics, candidate))
    by_layer = factors(costs)
    shares = [0.0] * structure.layers
    for number, block in _levelled_blocks(objective, layers).items():
        if not candidate.budget.removes_whole(block):
            shares[block.layer] = 1 - min(1.0, counts[number] / block.groups * by_layer.get(block.layer, 1.0))
    # Heads that are ranked with the channels have no share of their own.
    budget = candidate.budget
    ranks_heads = budget.ranking == "global" and budget.head_share > 0 and not budget.heads
    if not by_layer or not any(shares) or ranks_heads:
        return None
    met = meet(candidate.model_copy(update={"budget": replace(budget, shares=tuple(shares))}))
    return met if met and kept_counts(structure, met.budget) != counts else None


def factors(costs: dict[int, Measured]) -> dict[int, float]:
    """By layer, how many times as many channels it gets. Costs are drawn towards their mean by what of their variance
    is noise."""
    if len(costs) < 2:
        return {}
    means = [cost for cost, _ in costs.values()]
    mean = statistics.fmean(means)
    noise = statistics.fmean(error**2 for _, error in costs.values())
    signal = max(0.0, statistics.pvariance(means) - noise)
    if mean <= 0 or not signal:
        return {}
    return {
        layer: min(_MOST_PER_ROUND, max(1 / _MOST_PER_ROUND, _relative(cost, error, mean, signal) ** _EXPONENT))
        for layer, (cost, error) in costs.items()
    }


def _relative(cost: float, error: float, mean: float, signal: float) -> float:
    drawn = mean + (cost - mean) * signal / (signal + error**2)
    return max(_LEAST_COST, drawn / mean)


def _levelled_blocks(objective: Objective, layers: range) -> dict[int, Block]:
    return {
        number: block
        for number, block in enumerate(objective.structure.blocks)
        if block.kind == "channels" and not block.experts and block.layer in layers
    }
