"""Levelling: removed attention is tried again, and heads and channels move from layers where they cost little to layers
where they cost much."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pydantic import BaseModel
from torch import Tensor
from typing_extensions import Self

from adapruner.evaluation._losses import log_probabilities
from adapruner.planning._budget import BudgetError, kept_counts, weigh_channels
from adapruner.search._history import compare
from adapruner.search._objective import Objective
from adapruner.search._probe import Measured, Probe
from adapruner.search._space import Candidate
from adapruner.structure._blocks import Block

# Standard errors that the gain of a change must exceed. Of several changes that are tried one by one, one may gain by
# chance; all widths move at once, which leaves less to chance.
_CERTAIN, _CERTAIN_OF_WIDTHS = 2.0, 1.0
# All changes of heads that pay are tried at once, the best half of them, and the best quarter: each was measured alone.
_DIVISORS = (1, 2, 4)
# Share of its kept channels that a layer gives up as well to measure their cost: the cost of fewer is lost in noise.
_PROBED_SHARE = 0.15
# A layer whose channels cost twice the mean gets 2 ** 0.4 times as many, and none more than 1.3 times or less than
# 1 / 1.3 times in a round. The removal is then scaled to the ratio, which changes narrow layers by more: widths that
# meet the ratio within the limit are worth the same (research/experiments/levelling.md).
_EXPONENT, _MOST_PER_ROUND = 0.4, 1.3
# Channels that cost nothing, or less: measured costs are noisy.
_LEAST_COST = 0.05

# A layer, and the number of heads that it gains or, negative, loses.
Change: TypeAlias = tuple[int, int]
Progress: TypeAlias = Callable[[int], None]


@dataclass(frozen=True)
class Judged:
    """A candidate and its loss on each window of the objective, in nats per predicted token."""

    candidate: Candidate
    losses: list[float]


class Tried(BaseModel, extra="forbid", frozen=True):
    """The gain of a change.

    Attributes:
        gain: decrease of the loss on the windows of the objective, in nats per predicted token.
        gain_standard_error: from the differences window by window; None if there is only one window.
        accepted: True if the gain exceeds the number of standard errors that this kind of change needs; the change was
            then made.
    """

    gain: float
    gain_standard_error: float | None
    accepted: bool

    @classmethod
    def compared(cls, before: Judged, after: Judged, certain: float, /, **fields: Any) -> Self:
        """Accepted for a gain of more than `certain` standard errors."""
        gain, error = compare(before.losses, after.losses)
        known = error if math.isfinite(error) else None
        return cls(gain=gain, gain_standard_error=known, accepted=gain > certain * (known or 0.0), **fields)


class KeptAttention(Tried, frozen=True):
    """The gain of keeping the attention of a layer that the search removed, at the same budget; two standard errors are
    needed."""

    layer: int


class MovedHeads(Tried, frozen=True):
    """Layers that keep other numbers of heads than before, with narrower or wider layers to make up for it. Two
    standard errors are needed.

    Attributes:
        changes: by layer, the number of heads that it gains or, negative, loses: KV groups, or query heads where these
            are removed.
    """

    changes: dict[int, int]


class MovedChannels(Tried, frozen=True):
    """The costs of channels, and the gain of moving channels between layers. One standard error is needed.

    Attributes:
        costs: by layer, the cost of the channels that would be removed next: nats of divergence from the dense model
            per predicted token and million parameters.
        standard_errors: by layer, the standard error of the cost, over the windows.
    """

    costs: dict[int, float]
    standard_errors: dict[int, float]


class Levelled(BaseModel, extra="forbid", frozen=True):
    """A candidate with its widths levelled.

    Attributes:
        candidate: that of the search if nothing was accepted.
        moves: the changes that were tried in all rounds, in this order.
        kept: the attention layers that were tried again before them.
    """

    candidate: Candidate
    moves: tuple[MovedHeads | MovedChannels, ...]
    kept: tuple[KeptAttention, ...] = ()


def level(
    objective: Objective,
    windows: Tensor,
    candidate: Candidate,
    rounds: int,
    layers: range | None = None,
    moves_heads: bool = True,
    progress: Progress | None = None,
) -> Levelled:
    """Keeps attention that is worth more than the widths that pay for it, then moves heads and channels between layers
    until no layer costs measurably more than another.

    A search of few trials tries few numbers of attention layers to remove. So each removed one is tried again, one
    after the other, with narrower layers to make up for it.

    At the best allocation, the groups that would be removed next cost the same per parameter in every layer. In each
    round, that cost is measured layer by layer at the present widths: the pruned and compensated model, with this layer
    narrower still, is compared with the dense model.

    Until then, rounding decides how many heads each layer loses, because a layer has few of them. A layer regains a
    head if that gains more than channels with the same number of parameters cost on average. It loses another head if
    that costs less, as long as other layers regain one for it: other kinds of text need heads more than the text of the
    objective does (research/experiments/levelling.md).

    The widths of all layers are then changed at once, by a part of what the costs suggest (with the heads before they
    were moved). This averages out noise, which accepting the best single moves would pick up. Costs are measured on
    other windows than those that decide what is accepted.

    Args:
        objective: decides what is accepted.
        windows: [windows, tokens], int64, to measure costs on.
        rounds: maximum number; the first round that gains nothing is the last.
        layers: layers that may be pruned; None for all.
        moves_heads: True to move heads too.
        progress: called with 1 after every measured block.
    """
    best = judge(objective, candidate)
    if not best:
        return Levelled(candidate=candidate, moves=())
    best, kept = keep_attention(objective, best)
    references = log_probabilities(objective.model, windows)
    layers = range(objective.structure.layers) if layers is None else layers
    moves: list[MovedHeads | MovedChannels] = []
    for _ in range(rounds):
        probe = Probe(objective, windows, references, best.candidate)
        costs = dict(channel_costs(probe, layers, progress))
        price = statistics.fmean(cost for cost, _ in costs.values()) if costs else 0.0
        paying = paying_changes(probe, layers, price, progress) if moves_heads and price > 0 else []
        del probe  # it holds a model
        best, heads = move_heads(objective, best, paying)
        best, channels = move_channels(objective, best, costs, layers)
        moves += [*heads, *channels]
        if not any(move.accepted for move in [*heads, *channels]):
            break
    return Levelled(candidate=best.candidate, moves=tuple(moves), kept=tuple(kept))


def judge(objective: Objective, candidate: Candidate | None) -> Judged | None:
    """The candidate with its losses; None if there is no candidate, its ratio cannot be met or a loss is not finite."""
    if not candidate:
        return None
    try:
        losses = [loss for batch in objective(candidate) for loss in batch.tolist()]
    except BudgetError:
        return None
    return Judged(candidate, losses) if all(map(math.isfinite, losses)) else None


def keep_attention(objective: Objective, best: Judged) -> tuple[Judged, list[KeptAttention]]:
    """The candidate with the attention that is worth more than the widths that pay for it, and all that was tried."""
    tried: list[KeptAttention] = []
    for layer in best.candidate.budget.without_attention:
        budget = best.candidate.budget
        kept = replace(budget, without_attention=tuple(other for other in budget.without_attention if other != layer))
        if judged := judge(objective, best.candidate.with_budget(kept)):
            tried.append(KeptAttention.compared(best, judged, _CERTAIN, layer=layer))
            best = judged if tried[-1].accepted else best
    return best, tried


def paying_changes(probe: Probe, layers: range, price: float, progress: Progress | None) -> list[Change]:
    """Changes of heads that each gain more than their standard error, largest gain first, additions and removals in
    turn: a head is removed only in exchange for another one.

    Args:
        price: of channels, in nats per predicted token and million parameters.
    """
    blocks = {
        number: block
        for number, block in enumerate(probe.objective.structure.blocks)
        if block.kind == "heads" and block.layer in layers and probe.counts[number]
    }

    def gains(sign: int) -> Iterator[tuple[Change, float]]:
        counts = {number: probe.counts[number] + sign * block.strata for number, block in blocks.items()}
        possible = [
            (number, count)
            for number, count in counts.items()
            if max(1, blocks[number].least) <= count <= blocks[number].groups
        ]
        measured = _measured(probe, possible, len(blocks), progress if sign > 0 else None)
        for number, (mean, error) in measured.items():
            block, change = blocks[number], sign * blocks[number].strata
            gain = -mean - price * change * block.parameters_per_group / 1e6
            if gain > error:
                yield (block.layer, change), gain

    paying = dict(gains(1))
    # No layer regains heads, so none may lose any.
    if not paying:
        return []
    paying |= gains(-1)
    changes: dict[int, int] = {}
    for layer, change in sorted(paying, key=paying.__getitem__, reverse=True):
        changes.setdefault(layer, change)
    more = [(layer, change) for layer, change in changes.items() if change > 0]
    fewer = [(layer, change) for layer, change in changes.items() if change < 0]
    exchanged = [change for pair in zip(more, fewer, strict=False) for change in pair]
    return exchanged + more[len(fewer) :]


def move_heads(objective: Objective, best: Judged, paying: Sequence[Change]) -> tuple[Judged, list[MovedHeads]]:
    """The candidate with the number of paying changes that lowers the loss on the windows of the objective most, and
    all that was tried."""
    structure, candidate = objective.structure, best.candidate
    counts = zip(structure.blocks, kept_counts(structure, candidate.budget), strict=True)
    kept = {block.layer: count for block, count in counts if block.kind == "heads"}
    tried: list[tuple[Judged, MovedHeads]] = []
    for most in sorted({-(-len(paying) // divisor) for divisor in _DIVISORS} - {0}, reverse=True):
        changes = dict(paying[:most])
        heads = tuple(kept.get(layer, 0) + changes.get(layer, 0) for layer in range(structure.layers))
        if judged := judge(objective, candidate.with_budget(replace(candidate.budget, heads=heads))):
            tried.append((judged, MovedHeads.compared(best, judged, _CERTAIN, changes=changes)))
    if not tried:
        return best, []
    judged, moved = max(tried, key=lambda pair: (pair[1].accepted, pair[1].gain))
    return judged if moved.accepted else best, [moved]


def channel_costs(probe: Probe, layers: range, progress: Progress | None) -> Iterator[tuple[int, Measured]]:
    """By layer, the cost of its next channels (see `MovedChannels`)."""
    blocks, fewer = _levelled_blocks(probe.objective, layers), dict[int, int]()
    for number, block in blocks.items():
        count, step = probe.counts[number], probe.budget.round_to * block.strata
        left = count - step * max(1, round(_PROBED_SHARE * count / step))
        if left >= max(1, block.least):
            fewer[number] = left
    for number, (mean, error) in _measured(probe, [*fewer.items()], len(blocks), progress).items():
        millions = (probe.counts[number] - fewer[number]) * blocks[number].parameters_per_group / 1e6
        yield blocks[number].layer, (mean / millions, error / millions)


def _measured(
    probe: Probe, changes: Sequence[tuple[int, int]], blocks: int, progress: Progress | None
) -> dict[int, Measured]:
    """By the number of the block, what is added by each change for which that is known.

    Args:
        blocks: of which some have no change.
        progress: called with numbers of blocks.
    """
    measured = {}
    report = progress or (lambda count: None)
    report(blocks - len(changes))
    for (number, _), added in zip(changes, probe.added(changes), strict=True):
        if added:
            measured[number] = added
        report(1)
    return measured


def move_channels(
    objective: Objective, best: Judged, costs: dict[int, Measured], layers: range
) -> tuple[Judged, list[MovedChannels]]:
    """The candidate with its widths changed according to their costs, if that lowers the loss on the windows of the
    objective, and all that was tried."""
    judged = judge(objective, with_moved_channels(objective, best.candidate, costs, layers))
    if not judged:
        return best, []
    means, errors = ({layer: measured[i] for layer, measured in costs.items()} for i in (0, 1))
    moved = MovedChannels.compared(best, judged, _CERTAIN_OF_WIDTHS, costs=means, standard_errors=errors)
    return judged if moved.accepted else best, [moved]


def with_moved_channels(
    objective: Objective, candidate: Candidate, costs: dict[int, Measured], layers: range
) -> Candidate | None:
    """The candidate with the width of every layer changed according to its cost. None if the costs do not differ
    measurably, or the budget cannot be met with these widths."""
    structure, budget = objective.structure, candidate.budget
    counts, by_layer = kept_counts(structure, budget), factors(costs)
    shares = [0.0] * structure.layers
    for number, block in _levelled_blocks(objective, layers).items():
        shares[block.layer] = 1 - min(1.0, counts[number] / block.groups * by_layer.get(block.layer, 1.0))
    if not by_layer or not any(shares):
        return None
    moved = candidate.with_budget(weigh_channels(structure, budget, shares))
    with suppress(BudgetError):
        if kept_counts(structure, moved.budget) != counts:
            return moved
    return None


def factors(costs: dict[int, Measured]) -> dict[int, float]:
    """By layer, the factor by which its number of channels changes. Costs are shrunk towards their mean by the share of
    their variance that is noise."""
    if len(costs) < 2:
        return {}
    means = [cost for cost, _ in costs.values()]
    mean = statistics.fmean(means)
    noise = statistics.fmean(error**2 for _, error in costs.values())
    signal = max(0.0, statistics.pvariance(means) - noise)
    if mean <= 0 or not signal:
        return {}

    def factor(cost: float, error: float) -> float:
        shrunk = mean + (cost - mean) * signal / (signal + error**2)
        return min(_MOST_PER_ROUND, max(1 / _MOST_PER_ROUND, math.pow(max(_LEAST_COST, shrunk / mean), _EXPONENT)))

    return {layer: factor(cost, error) for layer, (cost, error) in costs.items()}


def _levelled_blocks(objective: Objective, layers: range) -> dict[int, Block]:
    return {
        number: block
        for number, block in enumerate(objective.structure.blocks)
        if block.kind == "channels" and not block.experts and block.layer in layers
    }
