"""Perplexity, with the protocol beside every number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel

# What the caches of a processor hold, and what keeps a GPU busy.
_TOKENS_PER_BATCH = {"cpu": 512, "cuda": 4096}


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
    losses = []
    for batch in losses_by_batch(model, windows):
        losses.append(batch)
        if progress:
            progress(len(batch))
    return torch.cat(losses)


def losses_by_batch(
    model: PreTrainedModel, windows: Tensor, references: Sequence[Tensor] | None = None
) -> Iterator[Tensor]:
    """[windows of one batch], float64, batch after batch: the mean over the predicted tokens of each window.

    Args:
        references: of another model, from `log_probabilities` of the same windows: gives the Kullback-Leibler
            divergence from that model to this one in place of the negative log-likelihood of the text.
    """
    for number, batch in enumerate(_batches(windows, model)):
        with torch.inference_mode():
            logits = _predictions(model, batch)
            losses = []
            # Window by window: float32 logits of a batch are the largest thing in memory.
            for window, own in enumerate(logits):
                if references is None:
                    loss = functional.cross_entropy(own.float(), batch[window, 1:].to(own.device), reduction="none")
                else:
                    reference = references[number][window].to(own.device).float()
                    divergence = functional.kl_div(
                        own.float().log_softmax(-1), reference, reduction="none", log_target=True
                    )
                    loss = divergence.sum(-1)
                losses.append(loss.double().mean())
            of_batch = torch.stack(losses).cpu()
        yield of_batch


def log_probabilities(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """[windows of one batch, tokens - 1, vocabulary], float16, for every batch: what the model predicts."""
    with torch.inference_mode():
        return [_predictions(model, batch).float().log_softmax(-1).half().cpu() for batch in _batches(windows, model)]


def _batches(windows: Tensor, model: PreTrainedModel) -> Sequence[Tensor]:
    tokens = _TOKENS_PER_BATCH.get(model.device.type, 1024)
    batches: Sequence[Tensor] = windows.split(max(1, tokens // windows.shape[1]))
    return batches


def _predictions(model: PreTrainedModel, batch: Tensor) -> Tensor:
    logits: Tensor = model(batch.to(model.device), use_cache=False).logits
    return logits[:, :-1]
