"""The order in which the attention of layers is removed whole, by the loss."""

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


class AttentionOrder(BaseModel, extra="forbid", frozen=True):
    """The layers in the order in which their attention is removed, and the loss after the removal of each alone, in
    nats per token, with nothing compensated."""

    layers: tuple[int, ...]
    losses: tuple[float, ...]

    def shortened(self, structure: Structure, ratio: float) -> tuple[int, ...]:
        """The order, cut off where attention would be more than half of the parameters to remove."""
        most, sizes = _LARGEST_SHARE * ratio * structure.total_parameters, structure.attention_parameters
        return self.layers[: sum(size <= most for size in accumulate(sizes[layer] for layer in self.layers))]


def attention_order(
    model: PreTrainedModel,
    structure: Structure,
    windows: Tensor,
    candidates: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> AttentionOrder:
    """Orders attentions by the loss after the removal of each alone (the first step of BlockPruner, arXiv 2406.10594,
    and of the second stage of 2SSP, arXiv 2501.17771). The layers before a candidate are not computed again.

    Args:
        windows: [windows, tokens], int64.
        candidates: the layers that can lose their attention.
        progress: called with 1 after every candidate.
    """
    prefix = compute_prefix(model, windows, structure.layers) if candidates else None
    losses = {}
    for layer in candidates:
        with without_attention(model, [layer]):
            loss = float(torch.cat([*losses_by_batch(model, windows, prefix=prefix, prefix_layers=layer)]).mean())
        if math.isfinite(loss):
            losses[layer] = loss
        if progress:
            progress(1)
    layers = sorted(losses, key=losses.__getitem__)[:_MOST_REMOVED]
    return AttentionOrder(layers=tuple(layers), losses=tuple(losses[layer] for layer in layers))
