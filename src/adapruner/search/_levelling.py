"""Levelling: removed attention is tried again, and heads and channels move from layers where they cost little to layers
where they cost much."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from typing_extensions import Self

from adapruner.evaluation._losses import compute_prefix, log_probabilities, losses_after_layers
from adapruner.models._architecture import architecture_of
from adapruner.models._layers import is_streamed, loaded_layer
from adapruner.planning._budget import BudgetError, kept_counts, weigh_channels
from adapruner.planning._plan import make_plan
from adapruner.search._objective import JUDGED_TOGETHER, Objective, scores_of
from adapruner.search._result import compare
from adapruner.search._space import Candidate
from adapruner.structure._blocks import Block
from adapruner.surgery._cut import prune_model, prune_on_reading

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
# The mean over windows, and its standard error.
Measured: TypeAlias = tuple[float, float]
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
    layers: range,
    moves_heads: bool,
    progress: Progress | None = None,
) -> Levelled:
    """Keeps attention that is worth more than the widths that pay for it, then moves heads and channels between layers
    until no layer costs measurably more than another.

    A search of few trials tries few numbers of attention layers to remove. So each removed one is tried again, one
    after the other, with narrower layers to make up for it.

    At the best allocation, the groups that would be removed next cost the same per parameter in every layer. In each
    round, that cost is measured layer by layer: the pruned and compensated model, with this layer narrower still, is
    compared with the dense model. A layer regains a head if that gains more than channels with the same number of
    parameters cost on average. It loses another one only in exchange, because other kinds of text need heads more than
    the text of the objective does (research/experiments/levelling.md). All widths are then changed at once, by a part
    of what the costs suggest, which averages out noise. Costs are measured on other windows than those that decide what
    is accepted.

    Args:
        objective: decides what is accepted.
        windows: [windows, tokens], int64, to measure costs on.
        rounds: maximum number; the first round that gains nothing is the last.
        layers: layers that may be pruned.
        moves_heads: True to move heads too.
        progress: called with 1 after every measured block.
    """
    best = judge(objective, candidate)
    if not best:
        return Levelled(candidate=candidate, moves=())
    best, kept = keep_attention(objective, best)
    references = log_probabilities(objective.model, windows)
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
    turn: a head is removed only in exchange for another one. The price of channels is in nats per predicted token and
    million parameters."""
    blocks = {
        number: block
        for number, block in enumerate(probe.objective.structure.blocks)
        if block.kind == "heads" and block.layer in layers and probe.counts[number]
    }

    def gains(sign: int) -> Iterator[tuple[Change, float]]:
        possible = {
            number: count
            for number, block in blocks.items()
            if max(1, block.least) <= (count := probe.counts[number] + sign * block.strata) <= block.groups
        }
        for number, (mean, error) in _measured(probe, possible, len(blocks), progress if sign > 0 else None):
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
    counts = kept_counts(structure, candidate.budget)
    kept = {block.layer: count for block, count in zip(structure.blocks, counts, strict=True) if block.kind == "heads"}
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
    for number, (mean, error) in _measured(probe, fewer, len(blocks), progress):
        millions = (probe.counts[number] - fewer[number]) * blocks[number].parameters_per_group / 1e6
        yield blocks[number].layer, (mean / millions, error / millions)


def _measured(
    probe: Probe, changes: dict[int, int], blocks: int, progress: Progress | None
) -> Iterator[tuple[int, Measured]]:
    """The number of the block and what is added, for each change for which that is known. Changes are numbers of kept
    groups by the number of the block; of so many blocks, some have none."""
    report = progress or (lambda count: None)
    report(blocks - len(changes))
    for number, added in zip(changes, probe.added([*changes.items()]), strict=True):
        if added:
            yield number, added
        report(1)


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
    with contextlib.suppress(BudgetError):
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


class Probe:
    """A pruned model whose single blocks are given other numbers of groups; `counts` are those that they keep."""

    def __init__(self, objective: Objective, windows: Tensor, references: list[Tensor], candidate: Candidate) -> None:
        self.objective, self.budget = objective, candidate.budget
        self._windows, self._references = windows, references
        structure = objective.structure
        self._scores = scores_of(structure, objective.statistics, candidate)
        self.counts = kept_counts(structure, candidate.budget)
        plan = make_plan(structure, self._scores, self.counts)
        self._model = prune_model(objective.model, structure, plan, objective.compensation)
        self._prefix = compute_prefix(self._model, windows, structure.layers)
        self._before = self._divergences([states[-1] for states in self._prefix.states])

    def _divergences(self, states: list[Tensor]) -> Tensor:
        """[windows], float64: divergences from the dense model, given the states of every batch after all layers."""
        after = losses_after_layers(self._model, self._windows, states, self._prefix.calls, self._references)
        return torch.cat(after)

    def added(self, changes: Sequence[tuple[int, int]]) -> Iterator[Measured | None]:
        """Increase of the divergence for each change alone, in nats per predicted token; None if it is not known. A
        change is the number of a block, and the number of groups that it keeps. Layers that are streamed are read once
        for several changes."""
        at_once = JUDGED_TOGETHER if is_streamed(self._model) else 1
        for first in range(0, len(changes), at_once):
            chosen = changes[first : first + at_once]
            states = self._changed(chosen)
            for number in range(len(chosen)):
                added = self._divergences(states.pop(number)) - self._before if number in states else torch.empty(0)
                is_known = len(added) > 1 and added.isfinite().all()
                yield (float(added.mean()), float(added.std() / math.sqrt(len(added)))) if is_known else None

    def _changed(self, changes: Sequence[tuple[int, int]]) -> dict[int, list[Tensor]]:
        """By the number of the change, the hidden states of every batch after the last layer."""
        blocks = [self.objective.structure.blocks[number] for number, _ in changes]
        states: dict[int, list[Tensor]] = {}
        for index in range(self.objective.structure.layers):
            changed = [number for number, block in enumerate(blocks) if block.layer == index]
            if not states and not changed:
                continue
            with loaded_layer(self._model, index) as layer:
                states = {number: self._after(index, layer, before) for number, before in states.items()}
                for number in changed:
                    with self._in_place(*changes[number]):
                        states[number] = self._after(index, layer, [known[index] for known in self._prefix.states])
        return states

    @torch.inference_mode()
    def _after(self, index: int, layer: nn.Module, states: list[Tensor]) -> list[Tensor]:
        """The hidden states of every batch after a layer."""
        return [calls[index].run(layer, state) for calls, state in zip(self._prefix.calls, states, strict=True)]

    @contextlib.contextmanager
    def _in_place(self, number: int, count: int) -> Iterator[None]:
        """While it lasts, a block of a loaded layer keeps so many groups: its projections are those of a model in which
        it alone is cut. For heads, the whole attention module is replaced, because it may store its number of
        heads."""
        structure = self.objective.structure
        block, counts = structure.blocks[number], [block.groups for block in structure.blocks]
        counts[number] = count
        plan = make_plan(structure, self._scores, counts)
        alone = prune_on_reading(self.objective.model, structure, plan, self.objective.compensation)
        if block.kind == "heads":
            names = architecture_of(alone.config)
            paths = {f"{names.layers}.{block.layer}.{names.module_of('heads')}"}
        else:
            paths = {name.rpartition(".")[0] for name in block.slices_by_parameter}
        before = {path: self._model.get_submodule(path) for path in paths}
        with loaded_layer(alone, block.layer):
            try:
                for path in paths:
                    self._model.set_submodule(path, alone.get_submodule(path))
                yield
            finally:
                for path in paths:
                    self._model.set_submodule(path, before[path])
