"""Levelling: parts that were removed whole are tried again, and heads and channels move from layers where they cost
little to layers where they cost much."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.evaluation import compute_prefix, log_probabilities, losses_by_batch
from adapruner.models import Whole, architecture_of
from adapruner.planning import Budget, kept_counts, make_plan
from adapruner.search._objective import Objective, scores_of
from adapruner.search._space import Candidate
from adapruner.structure import Block
from adapruner.surgery import kept_layers, prune_model

# What a layer gives up more to see what its channels are worth, as a share of those it keeps: less drowns in noise.
_PROBED_SHARE = 0.15
# A layer whose channels cost twice the mean gets 2 ** 0.4 times as many, and none more than 1.3 times or less than
# 1 / 1.3 times in a round.
_EXPONENT, _MOST_PER_ROUND = 0.4, 1.3
# Channels that cost nothing, or less: measured costs are noisy.
_LEAST_COST = 0.05
# A part is kept, and heads are moved, for a gain of so many standard errors: of several that are tried, one gains by
# chance.
_CERTAIN = 2.0
# All changes of heads that pay are tried at once, the best half of them, and the best quarter: each was measured alone.
_TRIED_HEADS = (1, 2, 4)

# The mean over windows, and its standard error.
_Measured = tuple[float, float]


class KeptPart(BaseModel):
    """What it gains to keep a part that the search removed whole, at the same budget.

    Attributes:
        gain: by how much the loss on the windows of the objective fell, in nats per predicted token.
        gain_standard_error: from the differences window by window; None where there is but one.
        accepted: whether the gain is more than twice that, and the part was kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    part: Whole
    gain: float
    gain_standard_error: float | None
    accepted: bool


class MovedHeads(BaseModel):
    """Layers that keep other numbers of heads than before, with narrower or wider layers to make up for it.

    Attributes:
        changes: by layer, how many heads it keeps more or, negative, fewer: KV groups, or query heads where these are
            removed.
        gain: by how much the loss on the windows of the objective fell, in nats per predicted token.
        gain_standard_error: from the differences window by window; None where there is but one.
        accepted: whether the gain is more than twice that, and the heads were moved.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    changes: dict[int, int]
    gain: float
    gain_standard_error: float | None
    accepted: bool


class MovedChannels(BaseModel):
    """What channels cost, and what it gains to move them.

    Attributes:
        costs: by layer, what its next channels to go would cost: nats of divergence from the dense model per predicted
            token and million parameters.
        standard_errors: of these, over the windows.
        gain, gain_standard_error: as for `MovedHeads`.
        accepted: whether the gain is more than its standard error, and the channels were moved.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    costs: dict[int, float]
    standard_errors: dict[int, float]
    gain: float
    gain_standard_error: float | None
    accepted: bool


class Levelled(BaseModel):
    """A candidate with its widths levelled.

    Attributes:
        candidate: the one of the search where nothing was accepted.
        moves: what was tried in all rounds, in this order.
        kept: what was tried before them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidate: Candidate
    moves: tuple[MovedHeads | MovedChannels, ...]
    kept: tuple[KeptPart, ...] = ()


def level(
    objective: Objective,
    windows: Tensor,
    candidate: Candidate,
    rounds: int,
    meet: Callable[[Candidate], Candidate | None],
    layers: range | None = None,
    moves_heads: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Levelled:
    """Keeps parts that the search had better not removed whole, and moves heads and channels between layers until none
    costs more than another, as far as can be told.

    A search of few trials tries few numbers of whole parts. So each part that is gone is tried again, one after the
    other, with narrower layers to make up for it.

    At the best allocation, what would be removed next costs the same per parameter in every layer. In each round, that
    cost is measured at the present widths, layer by layer: the pruned and compensated model, with the layer yet
    narrower, against the dense one.

    Which layers lose how many heads is chance until then: layers have few of them, and what the profile says is
    rounded. A layer has one back where that gains more than channels with as many parameters cost in the mean, and
    loses another one where that costs less, as long as other layers have as many back: other kinds of text need heads
    more than that of the objective does (docs/benchmarks.md).

    The widths of all layers are then changed at once, by a part of what the costs say (with the heads before they were
    moved), which averages out the noise that accepting the best single moves picks up. The windows that costs are
    measured on are not those that decide what is accepted.

    Args:
        objective: what decides; its windows are judged by the loss.
        windows: [windows, tokens], int64, to measure costs on.
        rounds: at most so many; the first that gains nothing is the last.
        meet: gives a candidate the ratio that meets the budget or a target; None if its allocation cannot.
        layers: that may be pruned; None for all.
        moves_heads: whether heads are moved too.
        progress: called with 1 after every measured block.
    """
    best = _losses(objective, candidate)
    if best is None:
        return Levelled(candidate=candidate, moves=())
    candidate, best, kept = _keep_parts(objective, candidate, best, meet)
    references = log_probabilities(objective.model, windows)
    layers = range(objective.structure.layers) if layers is None else layers
    moves: list[MovedHeads | MovedChannels] = []
    for _ in range(rounds):
        costs, paying = _measured(objective, windows, references, candidate, layers, moves_heads, progress)
        candidate, best, heads = _move_heads(objective, candidate, best, paying, meet)
        candidate, best, channels = _move_channels(objective, candidate, best, costs, layers, meet)
        made: list[MovedHeads | MovedChannels] = [*heads, *channels]
        moves += made
        if not any(one.accepted for one in made):
            break
    return Levelled(candidate=candidate, moves=tuple(moves), kept=tuple(kept))


def _keep_parts(
    objective: Objective, candidate: Candidate, best: list[float], meet: Callable[[Candidate], Candidate | None]
) -> tuple[Candidate, list[float], list[KeptPart]]:
    """The candidate without removing what is worth more than the widths that pay for it, its losses on the windows of
    the objective, and what was tried.

    Args:
        best: the losses of the candidate as it is.
    """
    kept: list[KeptPart] = []
    for layer, part in _removed_whole(candidate.budget):
        changed = meet(candidate.model_copy(update={"budget": _keeping(candidate.budget, layer)}))
        losses = _losses(objective, changed) if changed else None
        if not changed or not losses:
            continue
        gain, error = _gain(best, losses)
        accepted = gain > _CERTAIN * (error or 0.0)
        kept.append(KeptPart(layer=layer, part=part, gain=gain, gain_standard_error=error, accepted=accepted))
        if accepted:
            candidate, best = changed, losses
    return candidate, best, kept


def _losses(objective: Objective, candidate: Candidate) -> list[float] | None:
    """None where one of them is not finite."""
    losses = [loss for batch in objective(candidate) for loss in batch.tolist()]
    return losses if all(map(math.isfinite, losses)) else None


def _gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float | None]:
    """By how much the loss fell, with the standard error of the differences window by window."""
    gains = [one - other for one, other in zip(before, after, strict=True)]
    return statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None


def _removed_whole(budget: Budget) -> list[tuple[int, Whole]]:
    """Layer by layer, what is removed whole of it."""
    attentions, feed_forwards = set(budget.without_attention), set(budget.without_feed_forward)
    parts: dict[int, Whole] = dict.fromkeys(attentions, "attention")
    parts.update(dict.fromkeys(feed_forwards, "feed-forward"))
    parts.update(dict.fromkeys(attentions & feed_forwards, "layer"))
    return sorted(parts.items())


def _keeping(budget: Budget, layer: int) -> Budget:
    """The budget without whole parts removed from a layer."""
    return replace(
        budget,
        without_attention=tuple(one for one in budget.without_attention if one != layer),
        without_feed_forward=tuple(one for one in budget.without_feed_forward if one != layer),
    )


def _levelled_blocks(objective: Objective, layers: range) -> dict[int, Block]:
    return {
        number: block
        for number, block in enumerate(objective.structure.blocks)
        if block.kind == "channels" and not block.experts and block.layer in layers
    }


class _Probe:
    """A pruned model, of which single blocks are given other numbers of groups.

    Attributes:
        counts: how many groups each block keeps.
    """

    def __init__(self, objective: Objective, windows: Tensor, references: list[Tensor], candidate: Candidate) -> None:
        self.objective, self.windows, self.references, self.budget = objective, windows, references, candidate.budget
        structure = objective.structure
        self._scores = scores_of(structure, objective.statistics, candidate)
        self.counts = kept_counts(structure, candidate.budget, self._scores)
        plan = make_plan(structure, self._scores, self.counts)
        self._layers = kept_layers(structure, plan)
        self._model = prune_model(objective.model, structure, plan, objective.compensation)
        self._prefix = compute_prefix(self._model, windows, len(self._layers))
        self._before = self._divergences(len(self._layers))

    def _divergences(self, same: int) -> Tensor:
        """[windows], float64: from the dense model, where so many of the first layers are as they were."""
        batches = losses_by_batch(self._model, self.windows, self.references, prefix=self._prefix, prefix_layers=same)
        return torch.cat(list(batches))

    def added(self, number: int, count: int) -> _Measured | None:
        """By how much the divergence grows if a block keeps so many groups, in nats per predicted token; None where
        that is not known."""
        structure, compensation = self.objective.structure, self.objective.compensation
        block, whole = structure.blocks[number], [each.groups for each in structure.blocks]
        if block.layer not in self._layers:
            return None
        alone = make_plan(structure, self._scores, [*whole[:number], count, *whole[number + 1 :]])
        other = prune_model(self.objective.model, structure, alone, compensation)
        same = self._layers.index(block.layer)
        with _in_place(self._model, other, block, same):
            added = self._divergences(same) - self._before
        if len(added) < 2 or not added.isfinite().all():
            return None
        return float(added.mean()), float(added.std() / math.sqrt(len(added)))


def _measured(
    objective: Objective,
    windows: Tensor,
    references: list[Tensor],
    candidate: Candidate,
    layers: range,
    moves_heads: bool,
    progress: Callable[[int], None] | None,
) -> tuple[dict[int, _Measured], list[tuple[int, int]]]:
    """By layer, the cost of its next channels (see `MovedChannels`), and the changes of heads that pay."""
    probe = _Probe(objective, windows, references, candidate)
    costs = dict(_channel_costs(probe, layers, progress))
    price = statistics.fmean(cost for cost, _ in costs.values()) if costs else 0.0
    is_told = moves_heads and price > 0
    return costs, _paying_changes(probe, layers, price, progress) if is_told else []


def _channel_costs(
    probe: _Probe, layers: range, progress: Callable[[int], None] | None
) -> Iterator[tuple[int, _Measured]]:
    """By layer, the cost of its next channels and the standard error of that."""
    for number, block in _levelled_blocks(probe.objective, layers).items():
        count, step = probe.counts[number], probe.budget.round_to * block.strata
        fewer = count - step * max(1, round(_PROBED_SHARE * count / step))
        if fewer >= max(1, block.least) and (added := probe.added(number, fewer)):
            millions = (count - fewer) * block.parameters_per_group / 1e6
            yield block.layer, (added[0] / millions, added[1] / millions)
        if progress:
            progress(1)


def _paying_changes(
    probe: _Probe, layers: range, price: float, progress: Callable[[int], None] | None
) -> list[tuple[int, int]]:
    """Layers and how many heads more or fewer they had better keep, each for a gain of more than its standard error,
    those that gain most first, more and fewer in turn: a head is removed only in exchange for another one.

    Args:
        price: of channels, in nats per predicted token and million parameters.
    """
    blocks = {
        number: block
        for number, block in enumerate(probe.objective.structure.blocks)
        if block.kind == "heads" and block.layer in layers and probe.counts[number]
    }

    def gains(sign: int) -> Iterator[tuple[tuple[int, int], float]]:
        for number, block in blocks.items():
            change = sign * block.strata
            count = probe.counts[number] + change
            if max(1, block.least) <= count <= block.groups and (added := probe.added(number, count)):
                gain = -added[0] - price * change * block.parameters_per_group / 1e6
                if gain > added[1]:
                    yield (block.layer, change), gain
            if progress and sign > 0:
                progress(1)

    paying = dict(gains(1))
    # No layer gets heads back, so none may lose any.
    if not paying:
        return []
    paying |= gains(-1)
    changes: dict[int, int] = {}
    for layer, change in sorted(paying, key=paying.__getitem__, reverse=True):
        changes.setdefault(layer, change)
    more = [(layer, change) for layer, change in changes.items() if change > 0]
    fewer = [(layer, change) for layer, change in changes.items() if change < 0]
    exchanged = [one for pair in zip(more, fewer, strict=False) for one in pair]
    return exchanged + more[len(fewer) :]


def _move_heads(
    objective: Objective,
    candidate: Candidate,
    best: list[float],
    paying: Sequence[tuple[int, int]],
    meet: Callable[[Candidate], Candidate | None],
) -> tuple[Candidate, list[float], list[MovedHeads]]:
    """The candidate with as many of the changes that pay as lower the loss on the windows of the objective most, its
    losses there, and what was tried.

    Args:
        best: the losses of the candidate as it is.
    """
    structure = objective.structure
    counts = kept_counts(structure, candidate.budget, scores_of(structure, objective.statistics, candidate))
    kept = {block.layer: count for block, count in zip(structure.blocks, counts, strict=True) if block.kind == "heads"}
    tried: list[tuple[Candidate, list[float], MovedHeads]] = []
    for most in sorted({-(-len(paying) // part) for part in _TRIED_HEADS} - {0}, reverse=True):
        changes = dict(paying[:most])
        heads = tuple(kept.get(layer, 0) + changes.get(layer, 0) for layer in range(structure.layers))
        changed = meet(candidate.model_copy(update={"budget": replace(candidate.budget, heads=heads)}))
        losses = _losses(objective, changed) if changed else None
        if changed and losses:
            gain, error = _gain(best, losses)
            moved = MovedHeads(
                changes=changes, gain=gain, gain_standard_error=error, accepted=gain > _CERTAIN * (error or 0.0)
            )
            tried.append((changed, losses, moved))
    if not tried:
        return candidate, best, []
    changed, losses, moved = max(tried, key=lambda one: (one[2].accepted, one[2].gain))
    return (changed, losses, [moved]) if moved.accepted else (candidate, best, [moved])


@contextlib.contextmanager
def _in_place(model: PreTrainedModel, other: PreTrainedModel, block: Block, layer: int) -> Iterator[None]:
    """While it lasts, the projections of a block are those of another model, which has all layers; of heads, the whole
    attention, which may know how many it has.

    Args:
        layer: which of the layers of the first model it is.
    """
    if block.kind == "heads":
        names = architecture_of(other.config)
        paths = {f"{names.layers}.{block.layer}.{names.module_of('heads')}"}
    else:
        paths = {name.rpartition(".")[0] for name in block.slices_by_parameter}
    own = {path: path.replace(f".{block.layer}.", f".{layer}.", 1) for path in paths}
    before = {path: model.get_submodule(own[path]) for path in paths}
    try:
        for path in paths:
            model.set_submodule(own[path], other.get_submodule(path))
        yield
    finally:
        for path in paths:
            model.set_submodule(own[path], before[path])


def _move_channels(
    objective: Objective,
    candidate: Candidate,
    best: list[float],
    costs: dict[int, _Measured],
    layers: range,
    meet: Callable[[Candidate], Candidate | None],
) -> tuple[Candidate, list[float], list[MovedChannels]]:
    """The candidate with its widths changed by what they cost, if that lowers the loss on the windows of the objective,
    its losses there, and what was tried.

    Args:
        best: the losses of the candidate as it is.
    """
    changed = _changed(objective, candidate, costs, layers, meet)
    losses = _losses(objective, changed) if changed else None
    if not changed or not losses:
        return candidate, best, []
    gain, error = _gain(best, losses)
    moved = MovedChannels(
        costs={layer: cost for layer, (cost, _) in costs.items()},
        standard_errors={layer: deviation for layer, (_, deviation) in costs.items()},
        gain=gain,
        gain_standard_error=error,
        accepted=gain > (error or 0.0),
    )
    return (changed, losses, [moved]) if moved.accepted else (candidate, best, [moved])


def _changed(
    objective: Objective,
    candidate: Candidate,
    measured: dict[int, _Measured],
    layers: range,
    meet: Callable[[Candidate], Candidate | None],
) -> Candidate | None:
    """The candidate with every layer changed by a part of what the costs say; None where they cannot be told apart, the
    budget cannot be met so, or heads and channels are ranked together."""
    structure = objective.structure
    counts = kept_counts(structure, candidate.budget, scores_of(structure, objective.statistics, candidate))
    factors = _factors(measured)
    shares = [0.0] * structure.layers
    for number, block in _levelled_blocks(objective, layers).items():
        if not candidate.budget.removes_whole(block):
            shares[block.layer] = 1 - min(1.0, counts[number] / block.groups * factors.get(block.layer, 1.0))
    # Heads that are ranked with the channels have no share of their own.
    budget = candidate.budget
    ranks_heads = budget.ranking == "global" and budget.head_share > 0 and not budget.heads
    if not factors or not any(shares) or ranks_heads:
        return None
    changed = meet(candidate.model_copy(update={"budget": replace(candidate.budget, shares=tuple(shares))}))
    return changed if changed and kept_counts(structure, changed.budget) != counts else None


def _factors(measured: dict[int, _Measured]) -> dict[int, float]:
    """By layer, how many times as many channels it gets. Costs are drawn towards their mean by what of their variance
    is noise."""
    if len(measured) < 2:
        return {}
    costs = [cost for cost, _ in measured.values()]
    mean = statistics.fmean(costs)
    noise = statistics.fmean(error**2 for _, error in measured.values())
    signal = max(0.0, statistics.pvariance(costs) - noise)
    if mean <= 0 or not signal:
        return {}
    return {
        layer: min(_MOST_PER_ROUND, max(1 / _MOST_PER_ROUND, _relative(cost, error, mean, signal) ** _EXPONENT))
        for layer, (cost, error) in measured.items()
    }


def _relative(cost: float, error: float, mean: float, signal: float) -> float:
    drawn = mean + (cost - mean) * signal / (signal + error**2)
    return max(_LEAST_COST, drawn / mean)
