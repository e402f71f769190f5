"""From statistics to scores: the importance terms, and the points of the metric space that mix them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, field_validator
from torch import Tensor

from adapruner.base.errors import AdaPrunerError
from adapruner.measurement.taylor import Statistics
from adapruner.options import Reduction, Space
from adapruner.structure.blocks import Structure

# A term gives one number for each of these; see `Structure`.
Unit = Literal["vectors", "inputs", "groups"]
TermFunction = Callable[[Statistics], Tensor]


@dataclass(frozen=True)
class Term:
    """An importance term.

    Attributes:
        function: [units], not negative, from statistics.
        unit: the function gives one number for each.
        family: terms of one family share a weight in the search: `taylor`, `activation`, `reconstruction`, or any other
            name, which makes a new family.
        share: in the points that are tried first, the share of the term in its family, 0 to 1, taken from the terms
            registered before it; for the first term of a family, the weight of the family.
        needs: required statistics that are not always measured: `moments`, `routing` (only for models with experts).
    """

    name: str
    function: TermFunction
    unit: Unit
    family: str
    share: float = 0.0
    needs: frozenset[str] = frozenset()


TERMS: dict[str, Term] = {}


def register_term(
    *, unit: Unit, family: str, needs: Iterable[str] = (), share: float = 0.0
) -> Callable[[TermFunction], TermFunction]:
    """A decorator that makes a function an importance term, under its own name. The extended space searches it.
    `Term` explains the arguments."""

    def register(function: TermFunction) -> TermFunction:
        name = function.__name__
        TERMS[name] = Term(name, function, unit, family, share, frozenset(needs))
        return function

    return register


def usable_terms(space: Space, with_routing: bool = False) -> list[Term]:
    """The registered terms that a search mixes, in the order in which they were registered."""
    mixed = PAPER_TERMS if space == "paper" else tuple(TERMS)
    return [TERMS[name] for name in mixed if with_routing or "routing" not in TERMS[name].needs]


def needs_removal_errors(space: Space) -> bool:
    """True if terms of the search need the errors of removing groups."""
    return any("moments" in term.needs for term in usable_terms(space))


def needs_moments(compensation: str, space: Space) -> bool:
    """True if second moments are measured: for compensation, or for terms of the search."""
    return compensation != "none" or needs_removal_errors(space)


@register_term(unit="vectors", family="taylor")
def coarse_first(statistics: Statistics) -> Tensor:
    """[vectors]: |Σ_k g_k w_k| with the gradient of the mean loss, the first-order change of the loss when the vector
    is removed (LLM-Pruner's vector-wise importance, arXiv 2305.11627, eq. 3)."""
    return statistics.taylor.mean(0).abs()


@register_term(unit="vectors", family="taylor")
def coarse_second(statistics: Statistics) -> Tensor:
    """[vectors]: ½ mean_j (Σ_k g_jk w_k)², the second-order change with the Fisher information as Hessian, taken of
    the vector as a whole (arXiv 2305.11627, eq. 4, summed before squaring)."""
    return statistics.taylor.square().mean(0) / 2


@register_term(unit="vectors", family="taylor")
def fine_first(statistics: Statistics) -> Tensor:
    """[vectors]: mean_j Σ_k |g_jk w_k|, element by element (LLM-Pruner's element-wise importance, arXiv 2305.11627,
    eq. 5). The mean over samples stands outside the absolute value, which makes the term a sum over samples; the form
    with the mean inside comes from statistics measured `jointly`."""
    return statistics.element_absolute.mean(0)


@register_term(unit="vectors", family="taylor")
def fine_second(statistics: Statistics) -> Tensor:
    """[vectors]: ½ Σ_k mean_j (g_jk w_k)², element by element with the diagonal Fisher information (arXiv 2305.11627,
    eq. 4 and 5)."""
    return statistics.element_squared.mean(0) / 2


# The terms of the paper (arXiv 2503.06184), which mixes them by a formula of its own.
PAPER_TERMS = tuple(TERMS)


@register_term(unit="inputs", family="activation")
def activation_norm(statistics: Statistics) -> Tensor:
    """[inputs]: ‖x_c‖₂ · Σ|W_c|, the norm as root mean square over all tokens (Wanda-sp: the score of Wanda, arXiv
    2306.11695, summed over the column; as in the repository of FLAP)."""
    return statistics.input_squared.mean(0).sqrt() * statistics.column_absolute


@register_term(unit="inputs", family="activation", share=1.0)
def fluctuation(statistics: Statistics) -> Tensor:
    """[inputs]: var(x_c) · ‖W_c‖² over all tokens, the rest of an input when its mean is kept as a bias (FLAP's
    WIFV, arXiv 2312.11983, eq. 5)."""
    variance = statistics.input_squared.mean(0) - statistics.input_mean.mean(0).square()
    return variance.clamp_min(0) * statistics.column_squared


@register_term(unit="groups", family="reconstruction", needs=["moments"])
def reconstruction(statistics: Statistics) -> Tensor:
    """[groups]: tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ), for a channel ‖W_c‖² / [H⁻¹]_cc: the error of the output of the block when
    the group is removed and the rest is compensated by least squares (optimal brain surgeon, Hassibi and Stork 1992;
    blocks as in arXiv 2203.07259)."""
    return _measured(statistics.removal_error, "from second moments")


@register_term(unit="groups", family="reconstruction", needs=["moments"], share=1.0)
def elimination(statistics: Statistics) -> Tensor:
    """[groups]: the error that each group adds to the output of the block when the groups are removed step by step, the
    cheapest first, and the rest is compensated each time (greedy form of `reconstruction`, ZipLM, arXiv 2302.04089). Of
    two groups that can replace each other, one ranks high, unless both are removed in one step: of 128 groups and more,
    a step removes a 64th."""
    return _measured(statistics.elimination_error, "from second moments")


@register_term(unit="groups", family="reconstruction", needs=["moments"], share=1.0)
def tempered_elimination(statistics: Statistics) -> Tensor:
    """[groups]: the geometric mean of `elimination` and of E‖x_g‖², the squared inputs of the group. It halves the
    influence of the output weights: an error of the output of a block tells how large it is, not how much it harms
    (research/experiments/channel-ranking.md)."""
    return _measured(statistics.tempered_error, "from second moments")


@register_term(unit="groups", family="conditional_variance", needs=["moments"])
def conditional_variance(statistics: Statistics) -> Tensor:
    """[groups]: tr(([H⁻¹]_gg)⁻¹), for a channel 1 / [H⁻¹]_cc: the part of the inputs of the group that the other inputs
    do not explain, when the groups are removed step by step, the smallest first. Like `elimination`, but without
    the output weights; the first group to be removed has the least ridge leverage (MoDeGPT, arXiv 2408.09632)."""
    return _measured(statistics.conditional_variance, "from second moments")


@register_term(unit="groups", family="routing", needs=["routing"])
def expert_output(statistics: Statistics) -> Tensor:
    """[groups]: the mean of router weight · ‖output‖ over the tokens that are sent to an expert (REAP, arXiv
    2510.13999); zeros for other groups."""
    share = _measured(statistics.routed_share, "of experts").sum(0)
    return _measured(statistics.routed_output, "of experts").sum(0) / share.clamp_min(torch.finfo(share.dtype).tiny)


@register_term(unit="groups", family="routing", needs=["routing"])
def expert_frequency(statistics: Statistics) -> Tensor:
    """[groups]: the share of tokens that are sent to an expert; zeros for other groups."""
    return _measured(statistics.routed_share, "of experts").mean(0)


def _measured(values: Tensor | None, how: str) -> Tensor:
    if values is None:
        raise AdaPrunerError(f"this importance term needs statistics measured {how}, which are missing")
    return values


class MetricPoint(BaseModel, extra="forbid", frozen=True):
    """A non-negative mix of importance terms.

    Attributes:
        weights: weight of each term, by name.
        alignment: `data` divides every term by its mean over the groups of the block before mixing, so that weights
            compare; `standard` subtracts the mean over the block and divides by the standard deviation, before the
            reduction (FLAP, arXiv 2312.11983, which so compares heads and channels of all layers); `none` mixes the
            terms as they are.
        reduction: reduces the vectors of a group to one number.
    """

    weights: dict[str, float]
    alignment: Literal["data", "standard", "none"] = "data"
    reduction: Reduction = "sum"

    @field_validator("weights")
    @classmethod
    def _known_and_usable(cls, weights: dict[str, float]) -> dict[str, float]:
        unknown = [name for name in weights if name not in TERMS]
        if unknown:
            raise ValueError(f"unknown importance terms {unknown}; known are {', '.join(TERMS)}")
        if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"weights must not be negative, and one must be positive: {weights}")
        return weights


# The metrics of LLM-Pruner (arXiv 2305.11627) as points of this space, under the names of its options. `param_mix`
# adds the unscaled second-order term, which is so small that the ranking is that of `param_first`.
LLM_PRUNER_METRICS = {
    "vectorize": MetricPoint(weights={"coarse_first": 1}, alignment="none"),
    "param_first": MetricPoint(weights={"fine_first": 1}, alignment="none"),
    "param_second": MetricPoint(weights={"fine_second": 1}, alignment="none"),
    "param_mix": MetricPoint(weights={"fine_first": 1, "fine_second": 1}, alignment="none"),
}


def score_groups(statistics: Statistics, structure: Structure, point: MetricPoint) -> Tensor:
    """The importance of every group: S(G) = Σ_terms weight · reduction over the vectors of the term (Kong et al., arXiv
    2503.06184, whose sum over the vectors is the outer one).

    Args:
        statistics: of the chosen samples only (`Statistics.select`).

    Returns:
        [groups], float64, in the order of `structure.blocks`. `prod` is given as the geometric mean, which ranks the
        groups of a block as the product does and does not underflow.
    """
    mixed = torch.zeros(structure.group_offsets[-1], dtype=torch.float64)
    group_of = {
        "vectors": structure.group_of_vector,
        "inputs": structure.group_of_input,
        "groups": torch.arange(structure.group_offsets[-1]),
    }
    for name, weight in point.weights.items():
        if weight:
            term = TERMS[name]
            values, groups = term.function(statistics).double(), group_of[term.unit]
            if point.alignment == "standard":
                values = _standardise(values, structure.block_of_group[groups])
            scores = _reduce(values, groups, point.reduction, structure.group_offsets[-1])
            if point.alignment == "data":
                scores /= _block_means(scores, structure.block_of_group).clamp_min(torch.finfo(scores.dtype).tiny)
            mixed += weight * scores
    return mixed


def _block_means(values: Tensor, blocks: Tensor) -> Tensor:
    """For every value, the mean of its block."""
    return _reduce(values, blocks, "mean", int(blocks.max()) + 1)[blocks]


def _standardise(values: Tensor, blocks: Tensor) -> Tensor:
    """Values minus the mean of their block, divided by its standard deviation."""
    centred = values - _block_means(values, blocks)
    return centred / _block_means(centred.square(), blocks).sqrt().clamp_min(torch.finfo(values.dtype).tiny)


def _reduce(values: Tensor, groups: Tensor, reduction: Reduction, count: int) -> Tensor:
    operation = {"sum": "sum", "mean": "mean", "max": "amax", "prod": "mean"}[reduction]
    values = values.log() if reduction == "prod" else values
    scores = torch.zeros(count, dtype=values.dtype)
    scores.scatter_reduce_(0, groups, values, operation, include_self=False)
    if reduction == "prod":
        # A group without values scores 0.
        is_covered = torch.zeros(count, dtype=torch.bool).index_fill_(0, groups, True)
        scores = torch.where(is_covered, scores.exp(), 0)
    return scores
