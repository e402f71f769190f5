"""The order in which attention and feed-forward modules and layers are removed whole: greedy, by the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.evaluation import compute_prefix, losses_by_batch
from adapruner.models import Whole, without_parts
from adapruner.structure import Structure

# Maximum number of parts of a kind that are removed whole, and their maximum share of the parameters to remove.
_MOST_WHOLE, _LARGEST_PART = 6, 0.5
# Number of remaining layers, those with the lowest loss before, that are measured again after every removal.
_MEASURED_AGAIN = 4


class RemovalOrders(BaseModel, extra="forbid", frozen=True):
    """For each part of a layer, the layers in the order of removal, and the loss after each removal.

    Attributes:
        losses: nats per token, with nothing else removed or compensated.
    """

    layers: dict[Whole, tuple[int, ...]]
    losses: dict[Whole, tuple[float, ...]]

    def shortened(self, structure: Structure, ratio: float) -> dict[Whole, tuple[int, ...]]:
        """The orders, each cut off where its part would be more than half of the parameters to remove."""
        most, shortened = _LARGEST_PART * ratio * structure.total_parameters, dict[Whole, tuple[int, ...]]()
        for part, layers in self.layers.items():
            sizes = structure.whole_parameters(part)
            shortened[part] = layers[: sum(size <= most for size in accumulate(sizes[layer] for layer in layers))]
        return shortened


def measurements(candidates: int) -> list[int]:
    """For each removal of one of so many parts, the number of candidates that are measured before it."""
    left = range(candidates, max(0, candidates - _MOST_WHOLE), -1)
    return [count if count == candidates else min(_MEASURED_AGAIN, count) for count in left]


def removal_orders(
    model: PreTrainedModel,
    structure: Structure,
    windows: Tensor,
    candidates: Mapping[Whole, Sequence[int]],
    progress: Callable[[int], None] | None = None,
) -> RemovalOrders:
    """Removes one attention module after another, each time the one whose removal gives the lowest loss, and likewise
    feed-forwards and layers (BlockPruner, arXiv 2406.10594; second stage of 2SSP, arXiv 2501.17771). The layers before
    a candidate are not computed again; after the first round only the most promising candidates are measured.

    Args:
        windows: [windows, tokens], int64.
        candidates: for each part, the layers that can lose it.
        progress: called with 1 after every candidate (see `measurements`).
    """
    layers, losses = dict[Whole, tuple[int, ...]](), dict[Whole, tuple[float, ...]]()
    for part, removable in candidates.items():
        layers[part], losses[part] = _greedily(model, structure, windows, part, removable, progress)
    return RemovalOrders(layers=layers, losses=losses)


def _greedily(
    model: PreTrainedModel,
    structure: Structure,
    windows: Tensor,
    part: Whole,
    candidates: Sequence[int],
    progress: Callable[[int], None] | None,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    removed, losses = list[int](), list[float]()
    last_known = dict.fromkeys(candidates, 0.0)
    prefix = compute_prefix(model, windows, structure.layers)
    call = prefix.calls[0][0]
    for measured in measurements(len(last_known)):
        if removed:
            del prefix  # two at once would be the largest thing in memory
            with without_parts(model, part, removed, call):
                prefix = compute_prefix(model, windows, structure.layers)
        promising = sorted(last_known, key=last_known.__getitem__)[:measured]
        for layer in promising:
            with without_parts(model, part, [*removed, layer], call):
                batches = list(losses_by_batch(model, windows, prefix=prefix, prefix_layers=layer))
            loss = float(torch.cat(batches).mean())
            last_known[layer] = math.inf if math.isnan(loss) else loss
            if progress:
                progress(1)
        best = min(promising, key=last_known.__getitem__)
        if not math.isfinite(last_known[best]):
            break
        removed.append(best)
        losses.append(last_known.pop(best))
    return tuple(removed), tuple(losses)
