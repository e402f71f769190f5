"""Compensation: the kept weights of a row-wise projection take over from the removed ones, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapruner.measurement import InputMoments, solve_damped
from adapruner.structure import Block

# Corrections of the kept weights: a bias alone (FLAP, arXiv 2312.11983), least squares, or both.
CompensationForm = Literal["bias", "least-squares", "least-squares-bias"]


@dataclass(frozen=True)
class Compensation:
    """A form of compensation, and the second moments that it needs, by number of the block."""

    form: CompensationForm
    moments: Mapping[int, InputMoments]

    @property
    def adds_bias(self) -> bool:
        """True if the row-wise projections get a bias, which adds parameters."""
        return self.form != "least-squares"

    def form_for(self, block: Block) -> CompensationForm | None:
        """The form for a block: None for whole experts, and without bias for channels inside experts."""
        if not block.is_projected or (block.experts and self.form == "bias"):
            return None
        return "least-squares" if block.experts else self.form


def compensate(weight: Tensor, moments: InputMoments, kept: Tensor, form: CompensationForm) -> tuple[Tensor, Tensor]:
    """The best columns to keep, and the bias to add, when some inputs of a projection are removed.

    Least squares minimises E‖W x − W' x_K − b‖² + damping · ‖W' − W_K‖² over W' (and b): W' = W_K + W_R S_RK (S_KK +
    damping · I)⁻¹ with S = E[x xᵀ], or with the covariance if there is a bias. Damping is towards the original
    columns and not towards zero, so the result is never worse on its own text than leaving them unchanged. The bias is
    b = W μ − W' μ_K.

    Args:
        weight: [outputs, inputs], any dtype.
        moments: of the inputs.
        kept: [kept], int64, the numbers of the kept inputs, ascending.

    Returns:
        [outputs, kept] in the dtype of the weight, and [outputs], zeros for the form `least-squares`.
    """
    is_removed = torch.ones(weight.shape[1], dtype=torch.bool)
    is_removed[kept] = False
    removed = is_removed.nonzero().flatten()
    kept, removed = kept.to(weight.device), removed.to(weight.device)
    kept_columns = weight[:, kept].float()
    if form != "bias":
        second = moments.second.to(weight.device)
        within, across = second[kept][:, kept], second[kept][:, removed]
        if form == "least-squares-bias":
            mean = moments.mean.double().to(weight.device)
            within = within.double() - torch.outer(mean[kept], mean[kept])
            across = (across.double() - torch.outer(mean[kept], mean[removed])).float()
        change = solve_damped(within, moments.damping, across @ weight[:, removed].float().T)
        kept_columns = kept_columns + change.T
    bias = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if form != "least-squares":
        mean = moments.mean.double().to(weight.device)
        bias = weight.double() @ mean - kept_columns.double() @ mean[kept]
    return kept_columns.to(weight.dtype), bias.to(weight.dtype)
