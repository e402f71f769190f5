"""The order in which the attention of layers is removed whole: greedy, by the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.evaluation._losses import compute_prefix, losses_by_batch
from adapruner.models._layers import without_attention
from adapruner.structure._blocks import Structure

# Maximum number of attention layers that are removed whole, and their maximum share of the parameters to remove.
_MOST_REMOVED, _LARGEST_SHARE = 6, 0.5
# Number of remaining layers, those with the lowest loss before, that are measured again after every removal.
_MEASURED_AGAIN = 4


class AttentionOrder(BaseModel, extra="forbid", frozen=True):
    """The layers in the order in which their attention is removed, and the loss after each removal, in nats per token,
    with nothing else removed or compensated."""

    layers: tuple[int, ...]
    losses: tuple[float, ...]

    def shortened(self, structure: Structure, ratio: float) -> tuple[int, ...]:
        """The order, cut off where attention would be more than half of the parameters to remove."""
        most, sizes = _LARGEST_SHARE * ratio * structure.total_parameters, structure.attention_parameters
        return self.layers[: sum(size <= most for size in accumulate(sizes[layer] for layer in self.layers))]


def measurements(candidates: int) -> list[int]:
    """For each removal from so many layers, the number of candidates that are measured before it."""
    left = range(candidates, max(0, candidates - _MOST_REMOVED), -1)
    return [count if count == candidates else min(_MEASURED_AGAIN, count) for count in left]


def attention_order(
    model: PreTrainedModel,
    structure: Structure,
    windows: Tensor,
    candidates: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> AttentionOrder:
    """Removes one attention after another, each time the one whose removal gives the lowest loss (BlockPruner, arXiv
    2406.10594; second stage of 2SSP, arXiv 2501.17771). The layers before a candidate are not computed again; after the
    first round only the most promising candidates are measured.

    Args:
        windows: [windows, tokens], int64.
        candidates: the layers that can lose their attention.
        progress: called with 1 after every candidate (see `measurements`).
    """
    removed, losses = list[int](), list[float]()
    last_known = dict.fromkeys(candidates, 0.0)
    for measured in measurements(len(last_known)):
        prefix = None  # two at once would be the largest thing in memory
        with without_attention(model, removed):
            prefix = compute_prefix(model, windows, structure.layers)
        promising = sorted(last_known, key=last_known.__getitem__)[:measured]
        for layer in promising:
            with without_attention(model, [*removed, layer]):
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
    return AttentionOrder(layers=tuple(removed), losses=tuple(losses))
