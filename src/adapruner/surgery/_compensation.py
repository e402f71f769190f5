"""Compensation: the kept weights of a row-wise projection take over from the removed ones, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from adapruner.measurement._moments import InputMoments
from adapruner.measurement._solving import solve_damped


def compensate(weight: Tensor, moments: InputMoments, kept: Tensor) -> Tensor:
    """The best columns to keep when some inputs of a projection are removed.

    They minimise E‖W x − W' x_K‖² + damping · ‖W' − W_K‖² over W': W' = W_K + W_R S_RK (S_KK + damping · I)⁻¹ with
    S = E[x xᵀ]. Damping is towards the original columns and not towards zero, so the result is never worse on its own
    text than leaving them unchanged.

    Args:
        weight: [outputs, inputs], any dtype.
        moments: of the inputs.
        kept: [kept], int64, the numbers of the kept inputs, ascending.

    Returns:
        [outputs, kept] in the dtype of the weight.
    """
    is_removed = torch.ones(weight.shape[1], dtype=torch.bool)
    is_removed[kept] = False
    removed = is_removed.nonzero().flatten()
    kept, removed = kept.to(weight.device), removed.to(weight.device)
    second = moments.second.to(weight.device)
    within, across = second[kept][:, kept], second[kept][:, removed]
    change = solve_damped(within, moments.damping, across @ weight[:, removed].float().T)
    return (weight[:, kept].float() + change.T).to(weight.dtype)
