"""Parts that the search removed whole, tried again."""

from __future__ import annotations

from dataclasses import replace

from adapruner.models import Whole
from adapruner.planning import Budget
from adapruner.search._objective import Objective
from adapruner.search.levelling._judging import CERTAIN, Judged, Meet, Tried, judge


class KeptPart(Tried):
    """The gain of keeping a part that the search removed whole, at the same budget; two standard errors are needed."""

    layer: int
    part: Whole


def keep_parts(objective: Objective, best: Judged, meet: Meet) -> tuple[Judged, list[KeptPart]]:
    """The candidate without removing what is worth more than the widths that pay for it, and what was tried."""
    kept: list[KeptPart] = []
    for layer, part in removed_whole(best.candidate.budget):
        budget = keeping(best.candidate.budget, layer)
        judged = judge(objective, meet(best.candidate.model_copy(update={"budget": budget})))
        if not judged:
            continue
        kept.append(KeptPart.compared(best, judged, CERTAIN, layer=layer, part=part))
        if kept[-1].accepted:
            best = judged
    return best, kept


def removed_whole(budget: Budget) -> list[tuple[int, Whole]]:
    """Layer by layer, what is removed whole of it."""
    attentions, feed_forwards = set(budget.without_attention), set(budget.without_feed_forward)
    parts: dict[int, Whole] = dict.fromkeys(attentions, "attention")
    parts.update(dict.fromkeys(feed_forwards, "feed-forward"))
    parts.update(dict.fromkeys(attentions & feed_forwards, "layer"))
    return sorted(parts.items())


def keeping(budget: Budget, layer: int) -> Budget:
    """The budget without whole parts removed from a layer."""
    return replace(
        budget,
        without_attention=tuple(one for one in budget.without_attention if one != layer),
        without_feed_forward=tuple(one for one in budget.without_feed_forward if one != layer),
    )
