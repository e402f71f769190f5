"""Damped systems of equations with second moments, and the sums for these moments."""

from __future__ import annotations

import torch
from torch import Tensor

from adapruner.errors import AdaPrunerError

_STRIPS = 8


def add_products(second: Tensor, x: Tensor) -> None:
    """Adds the sum of x xᵀ to the upper triangle, in place: nearly half the work of both triangles (see `symmetric`).

    Args:
        second: [inputs, inputs], float32. A strip of the lower triangle next to the diagonal is written too.
        x: [tokens, inputs], float32.
    """
    for strip in torch.arange(x.shape[1]).tensor_split(_STRIPS):
        if len(strip):
            start, stop = int(strip[0]), int(strip[-1]) + 1
            second[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def symmetric(upper: Tensor) -> Tensor:
    """[…, inputs, inputs]: the symmetric matrix with this upper triangle."""
    return upper.triu().add_(upper.triu(1).mT)


def factorize(second: Tensor, damping: float) -> Tensor:
    """[inputs, inputs], float64: the Cholesky factor of H + damping · I.

    If rounding in H makes that not positive definite, the damping is multiplied by ten until it is. In float64, because
    most language models have a few huge inputs, which leave float32 no digits for the others.

    Raises:
        AdaPrunerError: H is not finite.
    """
    if not second.isfinite().all():
        raise AdaPrunerError("second moments of activations are not finite: try `dtype` float32")
    damping = max(damping, torch.finfo(torch.float32).tiny)
    while True:
        damped = second.to(torch.float64, copy=True)
        damped.diagonal().add_(damping)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
        damping *= 10


def solve_damped(second: Tensor, damping: float, right: Tensor) -> Tensor:
    """[inputs, columns], float32: the solution X of (H + damping · I) X = right.

    In float32 after every input was scaled to a unit moment, which keeps the digits of huge and of other inputs; in
    float64 if rounding makes even that not positive definite.

    Raises:
        AdaPrunerError: H is not finite.
    """
    factor, scale = scaled_factor(second, damping)
    if factor is None:
        return torch.cholesky_solve(right.double(), factorize(second, damping)).float()
    return torch.cholesky_solve((right * scale[:, None]).float(), factor) * scale[:, None]


def scaled_factor(second: Tensor, damping: float) -> tuple[Tensor | None, Tensor]:
    """The Cholesky factor of H + damping · I, float32, after every input was divided by the root of its moment, and
    the inverse of that divisor, [inputs]. The factor is None if rounding makes the matrix not positive definite."""
    damping = max(damping, torch.finfo(torch.float32).tiny)
    scale = (second.diagonal() + damping).rsqrt()
    scaled = (second * scale).mul_(scale[:, None]).float()
    scaled.fill_diagonal_(1.0)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    return (None if failed else factor), scale
