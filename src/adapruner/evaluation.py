"""Perplexity, with the protocol beside every number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel

TOKENS_PER_BATCH = 1024


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it was measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood over all predicted tokens.
        text: the source and the part of it.
        window_length: tokens per window; windows do not overlap, the first token of each is not predicted.
        windows: how many windows.
    """

    perplexity: float
    text: str
    window_length: int
    windows: int

    @property
    def predicted_tokens(self) -> int:
        return self.windows * (self.window_length - 1)

    @property
    def protocol(self) -> str:
        """One line that says how the number came about."""
        return (
            f"{self.text}: {self.windows} windows of {self.window_length} tokens without overlap, mean over"
            f" {self.predicted_tokens:,} predicted tokens"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"predicted_tokens": self.predicted_tokens, "protocol": self.protocol}


def measure_perplexity(
    model: PreTrainedModel, windows: Tensor, text: str, progress: Callable[[int], None] | None = None
) -> Perplexity:
    """The perplexity over windows.

    Args:
        windows: [windows, tokens], int64 (see `calibration.text_windows`).
        text: what the windows are of, for the protocol.
        progress: called with the number of windows done after each batch.
    """
    losses = window_losses(model, windows, progress)
    return Perplexity(math.exp(losses.mean()), text, windows.shape[1], len(windows))


def window_losses(model: PreTrainedModel, windows: Tensor, progress: Callable[[int], None] | None = None) -> Tensor:
    """[windows], float64: the mean negative log-likelihood in nats of the predicted tokens of each window."""
    batch_size = max(1, TOKENS_PER_BATCH // windows.shape[1])
    losses = []
    with torch.inference_mode():
        for batch in windows.split(batch_size):
            batch = batch.to(model.device)
            logits = model(batch, use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            losses.append(loss.view(len(batch), -1).double().mean(1).cpu())
            if progress:
                progress(len(batch))
    return torch.cat(losses)
