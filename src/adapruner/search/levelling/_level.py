"""Rounds of levelling."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from adapruner.evaluation import log_probabilities
from adapruner.search._objective import Objective
from adapruner.search._space import Candidate
from adapruner.search.levelling._channels import MovedChannels, channel_costs, move_channels
from adapruner.search.levelling._heads import Change, MovedHeads, move_heads, paying_changes
from adapruner.search.levelling._judging import Meet, judge
from adapruner.search.levelling._parts import KeptPart, keep_parts
from adapruner.search.levelling._probe import Measured, Probe


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
    meet: Meet,
    layers: range | None = None,
    moves_heads: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Levelled:
    """Keeps parts that the search had better not removed whole, and moves heads and channels between layers until none
    costs more than another, as far as can be told.

    A search of few trials tries few numbers of whole parts. So each removed part is tried again, one after the
    other, with narrower layers to make up for it.

    At the best allocation, what would be removed next costs the same per parameter in every layer. In each round, that
    cost is measured at the present widths, layer by layer: the pruned and compensated model, with the layer yet
    narrower, against the dense one.

    Which layers lose how many heads is chance until then: layers have few of them, and what the profile says is
    rounded. A layer has one back where that gains more than channels with as many parameters cost in the mean, and
    loses another one where that costs less, as long as other layers have as many back: other kinds of text need heads
    more than that of the objective does (docs/experiments.md).

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
    best = judge(objective, candidate)
    if not best:
        return Levelled(candidate=candidate, moves=())
    best, kept = keep_parts(objective, best, meet)
    references = log_probabilities(objective.model, windows)
    layers = range(objective.structure.layers) if layers is None else layers
    moves: list[MovedHeads | MovedChannels] = []
    for _ in range(rounds):
        probe = Probe(objective, windows, references, best.candidate)
        costs, paying = _measured(probe, layers, moves_heads, progress)
        # It holds a model.
        del probe
        best, heads = move_heads(objective, best, paying, meet)
        best, channels = move_channels(objective, best, costs, layers, meet)
        moves += [*heads, *channels]
        if not any(one.accepted for one in [*heads, *channels]):
            break
    return Levelled(candidate=best.candidate, moves=tuple(moves), kept=tuple(kept))


def _measured(
    probe: Probe, layers: range, moves_heads: bool, progress: Callable[[int], None] | None
) -> tuple[dict[int, Measured], list[Change]]:
    """By layer, the cost of its next channels (see `MovedChannels`), and the changes of heads that pay."""
    costs = dict(channel_costs(probe, layers, progress))
    price = statistics.fmean(cost for cost, _ in costs.values()) if costs else 0.0
    return costs, paying_changes(probe, layers, price, progress) if moves_heads and price > 0 else []
