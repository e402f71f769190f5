"""Statistics of the samples of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_OF_ALL_SAMPLES = ("column_absolute", "column_squared", "removal_error", "elimination_error", "conditional_variance")


@dataclass(frozen=True)
class Statistics:
    """The data of importance terms, in float32; vectors, inputs and groups as in `Structure`.

    With g the gradient of the mean loss of one sample, w the weights of one vector, x an input of a row-wise projection
    at the tokens of one sample, and W_c the column of the projection that multiplies it:

    Attributes:
        taylor: [samples, vectors], Σ_k g_k w_k, signed.
        loss: [samples], the mean loss in nats per predicted token.
        input_mean: [samples, inputs], mean of x.
        input_squared: [samples, inputs], mean of x².
        column_absolute: [inputs], Σ|W_c|.
        column_squared: [inputs], ‖W_c‖².
        element_absolute: [samples, vectors], Σ_k |g_k w_k|; None if only vector-wise terms were measured.
        element_squared: [samples, vectors], Σ_k (g_k w_k)²; None likewise.
        routed_output: [samples, groups], for an expert the mean over all tokens of router weight · ‖output‖, 0 for
            tokens that are sent elsewhere; zeros for other groups; None without experts.
        routed_share: [samples, groups], the share of tokens that are sent to an expert; likewise.
        removal_error, elimination_error, conditional_variance: [groups], from second moments (`removal_errors`), which
            may be measured on other and more text than the samples; None if they were not measured.
    """

    taylor: Tensor
    loss: Tensor
    input_mean: Tensor
    input_squared: Tensor
    column_absolute: Tensor
    column_squared: Tensor
    element_absolute: Tensor | None = None
    element_squared: Tensor | None = None
    routed_output: Tensor | None = None
    routed_share: Tensor | None = None
    removal_error: Tensor | None = None
    elimination_error: Tensor | None = None
    conditional_variance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def per_sample(self) -> dict[str, Tensor]:
        """The measured values that differ from sample to sample, [samples, ·]."""
        return {name: value for name, value in self._present.items() if name not in _OF_ALL_SAMPLES}

    @property
    def _present(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def select(self, samples: Sequence[int]) -> Statistics:
        """The statistics of some of the samples."""
        rows = torch.as_tensor(samples)
        return replace(self, **{name: value[rows] for name, value in self.per_sample.items()})

    @staticmethod
    def concatenate(parts: Sequence[Statistics]) -> Statistics:
        """Joins statistics of the same model over different samples, in the given order."""
        return replace(
            parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].per_sample}
        )

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        save_file(self._present, path)

    @staticmethod
    def load(path: Path) -> Statistics:
        """Reads a file written by `save`."""
        return Statistics(**load_file(path))
