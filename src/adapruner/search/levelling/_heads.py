"""Layers that keep other numbers of heads than the search gave them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from adapruner.planning import kept_counts
from adapruner.search._objective import Objective, scores_of
from adapruner.search.levelling._judging import CERTAIN, Judged, Meet, Tried, judge
from adapruner.search.levelling._probe import Probe

# All changes of heads that pay are tried at once, the best half of them, and the best quarter: each was measured alone.
_DIVISORS = (1, 2, 4)

# A layer, and how many heads more or fewer it keeps.
Change: TypeAlias = tuple[int, int]


class MovedHeads(Tried):
    """Layers that keep other numbers of heads than before, with narrower or wider layers to make up for it. Two
    standard errors are needed.

    Attributes:
        changes: by layer, how many heads it keeps more or, negative, fewer: KV groups, or query heads where these are
            removed.
    """

    changes: dict[int, int]


def paying_changes(probe: Probe, layers: range, price: float, progress: Callable[[int], None] | None) -> list[Change]:
    """Changes of heads that each gain more than their standard error, those that gain most first, more and fewer in
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


def move_heads(
    objective: Objective, best: Judged, paying: Sequence[Change], meet: Meet
) -> tuple[Judged, list[MovedHeads]]:
    """The candidate with as many of the changes that pay as lower the loss on the windows of the objective most, and
    what was tried."""
    structure, candidate = objective.structure, best.candidate
    counts = kept_counts(structure, candidate.budget, scores_of(structure, objective.statistics, candidate))
    kept = {block.layer: count for block, count in zip(structure.blocks, counts, strict=True) if block.kind == "heads"}
    tried: list[tuple[Judged, MovedHeads]] = []
    for most in sorted({-(-len(paying) // divisor) for divisor in _DIVISORS} - {0}, reverse=True):
        changes = dict(paying[:most])
        heads = tuple(kept.get(layer, 0) + changes.get(layer, 0) for layer in range(structure.layers))
        budget = replace(candidate.budget, heads=heads)
        if judged := judge(objective, meet(candidate.model_copy(update={"budget": budget}))):
            tried.append((judged, MovedHeads.compared(best, judged, CERTAIN, changes=changes)))
    if not tried:
        return best, []
    judged, moved = max(tried, key=lambda one: (one[1].accepted, one[1].gain))
    return judged if moved.accepted else best, [moved]
