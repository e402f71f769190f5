"""A point of the metric space, and the score that it gives every group."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, field_validator
from torch import Tensor

from adapruner.config import Reduction
from adapruner.importance._terms import TERMS
from adapruner.measurement._statistics import Statistics
from adapruner.structure._blocks import Structure


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

# Peers that rank by activations, as points of this space (see the terms for their sources).
ACTIVATION_METRICS = {
    "wanda_sp": MetricPoint(weights={"activation_norm": 1}, alignment="none"),
    "flap": MetricPoint(weights={"fluctuation": 1}, alignment="standard", reduction="mean"),
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
