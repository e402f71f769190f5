"""The importance terms: each turns the statistics of the chosen samples into one number per vector."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from adapruner.measurement import Statistics

Term = Callable[[Statistics], Tensor]

TERMS: dict[str, Term] = {}


def _register(term: Term) -> Term:
    TERMS[term.__name__] = term
    return term


@_register
def coarse_first(statistics: Statistics) -> Tensor:
    """[vectors]: |Σ_k g_k w_k| with the gradient of the mean loss, the first-order change of the loss when the vector
    is removed (LLM-Pruner's vector-wise importance, arXiv 2305.11627, eq. 3)."""
    return statistics.taylor.mean(0).abs()


@_register
def coarse_second(statistics: Statistics) -> Tensor:
    """[vectors]: ½ mean_j (Σ_k g_jk w_k)², the second-order change with the Fisher information as Hessian, taken of
    the vector as a whole (arXiv 2305.11627, eq. 4, summed before squaring)."""
    return statistics.taylor.square().mean(0) / 2


@_register
def fine_first(statistics: Statistics) -> Tensor:
    """[vectors]: mean_j Σ_k |g_jk w_k|, element by element (LLM-Pruner's element-wise importance, arXiv 2305.11627,
    eq. 5). The mean over samples stands outside the absolute value, which makes the term a sum over samples; the form
    with the mean inside comes from statistics measured `jointly`."""
    return statistics.element_absolute.mean(0)


@_register
def fine_second(statistics: Statistics) -> Tensor:
    """[vectors]: ½ Σ_k mean_j (g_jk w_k)², element by element with the diagonal Fisher information (arXiv 2305.11627,
    eq. 4 and 5)."""
    return statistics.element_squared.mean(0) / 2
