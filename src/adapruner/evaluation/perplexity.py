"""Perplexity, with the protocol of every number."""

from __future__ import annotations

import math
from collections.abc import Callable

from pydantic import BaseModel, computed_field
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.evaluation.losses import window_losses

# Datasets and tokens per window that others report with: LLM-Pruner (arXiv 2305.11627) and the paper; SparseGPT, Wanda,
# FLAP, SliceGPT.
PROTOCOLS = {"llm-pruner": (("wikitext2:test", "ptb:validation"), 128), "2048": (("wikitext2:test",), 2048)}


class Perplexity(BaseModel, frozen=True, ser_json_inf_nan="constants"):
    """A perplexity and how it was measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood over all predicted tokens.
        text: the source and its part.
        seq_len: tokens per window; the first token of a window is not predicted.
        windows: the number of windows.
        stride: tokens of the text from the beginning of a window to the beginning of the next. If windows overlap, all
            but the last `stride` tokens of a window are context only, except in the first window.
        provenance: the dataset and its tokenization (`calibration.provenance`): `data_set`, `split`, `revision`,
            `tokenizer`, and `every_window_after` if windows begin with a special token.
        predicted_bytes: UTF-8 bytes of the text of all predicted tokens; None if the tokenizer does not know the text
            of a token.
        special_tokens: the number of special tokens at the beginning of every window; they are not predicted.
        loss_standard_error: of the mean negative log-likelihood, in nats per token: the standard deviation over the
            windows divided by the root of their number, which assumes that windows are independent; None if they
            overlap, or there is only one.
    """

    perplexity: float
    text: str
    seq_len: int
    windows: int
    stride: int
    provenance: dict[str, str] = {}
    predicted_bytes: int | None = None
    special_tokens: int = 0
    loss_standard_error: float | None = None

    @computed_field
    @property
    def bits_per_byte(self) -> float | None:
        """The negative log-likelihood of the predicted text in bits, divided by its bytes. Unlike the perplexity, it
        compares models with different tokenizers."""
        if not self.predicted_bytes:
            return None
        return math.log2(self.perplexity) * self.predicted_tokens / self.predicted_bytes

    @computed_field
    @property
    def predicted_tokens(self) -> int:
        """The number of tokens in the mean."""
        per_window = self.seq_len - max(1, self.special_tokens)
        return per_window + (self.windows - 1) * min(self.stride, per_window)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the perplexity, to first order; None if the standard error of the loss is not known."""
        return None if self.loss_standard_error is None else self.perplexity * self.loss_standard_error

    @property
    def bits_standard_error(self) -> float | None:
        """Standard error of the bits per byte; None if it or the bits per byte are not known."""
        if self.loss_standard_error is None or not self.predicted_bytes:
            return None
        return self.loss_standard_error / math.log(2) * self.predicted_tokens / self.predicted_bytes

    @computed_field
    @property
    def protocol(self) -> str:
        """How the number was measured, on one line."""
        overlaps = self.stride < self.seq_len - self.special_tokens
        overlap = f"every {self.stride} tokens" if overlaps else "without overlap"
        counted = f" of {self.predicted_bytes:,} bytes" if self.predicted_bytes else ""
        origin = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.provenance.items())
        return (
            f"{self.text}: {self.windows} windows of {self.seq_len} tokens {overlap}, mean over"
            f" {self.predicted_tokens:,} predicted tokens{counted}{f' ({origin})' if origin else ''}"
        )


def measure_perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    text: str,
    progress: Callable[[int], None] | None = None,
    stride: int | None = None,
    provenance: dict[str, str] | None = None,
    predicted_bytes: int | None = None,
    special_tokens: int = 0,
) -> Perplexity:
    """The perplexity over windows.

    Args:
        windows: [windows, tokens], int64 (see `calibration.evaluation_text`).
        text: the name of their text, for the protocol.
        progress: called with the number of windows done after each batch.
        stride: tokens between the beginnings of windows; by default they do not overlap.
        provenance, predicted_bytes, special_tokens: see `Perplexity`.
    """
    seq_len = windows.shape[1]
    stride = stride or seq_len
    standard_error, context = None, max(1, special_tokens)
    if stride >= seq_len - special_tokens:
        losses = window_losses(model, windows, progress, context)
        mean = losses.mean()
        if len(losses) > 1:
            standard_error = float(losses.std() / math.sqrt(len(losses)))
    else:
        first, others = seq_len - context, windows[1:]
        stride = min(stride, first)
        total = window_losses(model, windows[:1], progress, context).sum() * first
        if len(others):
            total += window_losses(model, others, progress, seq_len - stride).sum() * stride
        mean = total / (first + len(others) * stride)
    return Perplexity(
        perplexity=float(mean.exp()),
        text=text,
        seq_len=seq_len,
        windows=len(windows),
        stride=stride,
        provenance=provenance or {},
        predicted_bytes=predicted_bytes,
        special_tokens=special_tokens,
        loss_standard_error=standard_error,
    )
