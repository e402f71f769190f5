"""A point of the metric space, and the score that it gives every group."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor

from adapruner.importance._terms import TERMS, Term
from adapruner.measurement import Statistics
from adapruner.structure import Structure

Alignment = Literal["data", "none"]
Reduction = Literal["sum", "mean", "max", "prod"]


class MetricPoint(BaseModel):
    """A non-negative mix of importance terms.

    Attributes:
        weights: weight of each term, by name.
        alignment: `data` divides every term by its mean over the groups of the block before mixing, so that weights
            compare; `none` mixes the terms as they are.
        reduction: how the vectors of a group become one number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: dict[str, float]
    alignment: Alignment = "data"
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
# adds the second-order term as it comes out, which is so small that the ranking is that of `param_first`.
LLM_PRUNER_METRICS = {
    "vectorize": MetricPoint(weights={"coarse_first": 1}, alignment="none"),
    "param_first": MetricPoint(weights={"fine_first": 1}, alignment="none"),
    "param_second": MetricPoint(weights={"fine_second": 1}, alignment="none"),
    "param_mix": MetricPoint(weights={"fine_first": 1, "fine_second": 1}, alignment="none"),
}


# Peers that rank by activations, as points of this space (see the terms for their sources).
ACTIVATION_METRICS = {
    "wanda_sp": MetricPoint(weights={"activation_norm": 1}, alignment="none"),
    "flap": MetricPoint(weights={"fluctuation": 1}, alignment="none"),
}


def score_groups(statistics: Statistics, structure: Structure, point: MetricPoint) -> Tensor:
    """The importance of every group: S(G) = Σ_terms weight · reduction over the vectors of the term (Kong et al., arXiv
    2503.06184, where the sum over the vectors stands outside).

    Args:
        statistics: of the chosen samples only (`Statistics.select`).

    Returns:
        [groups], float64, in the order of `structure.blocks`. `prod` is given as the geometric mean, which ranks the
        groups of a block as the product does and does not underflow.
    """
    mixed = torch.zeros(structure.group_offsets[-1], dtype=torch.float64)
    for name, weight in point.weights.items():
        if weight:
            values = _reduce(TERMS[name], statistics, structure, point.reduction)
            mixed += weight * (divide_by_block_mean(values, structure) if point.alignment == "data" else values)
    return mixed


def divide_by_block_mean(scores: Tensor, structure: Structure) -> Tensor:
    """[groups]: scores relative to the mean of their block, so that blocks and terms compare."""
    means = torch.zeros(len(structure.blocks), dtype=scores.dtype)
    means.scatter_reduce_(0, structure.block_of_group, scores, "mean", include_self=False)
    return scores / means.clamp_min(torch.finfo(scores.dtype).tiny)[structure.block_of_group]


def _reduce(term: Term, statistics: Statistics, structure: Structure, reduction: Reduction) -> Tensor:
    values = term.values(statistics).double()
    if term.unit == "groups":
        return values
    group_of_value = structure.group_of_vector if term.unit == "vectors" else structure.group_of_input
    operation = {"sum": "sum", "mean": "mean", "max": "amax", "prod": "mean"}[reduction]
    values = values.log() if reduction == "prod" else values
    scores = torch.zeros(structure.group_offsets[-1], dtype=values.dtype)
    scores.scatter_reduce_(0, group_of_value, values, operation, include_self=False)
    return scores.exp() if reduction == "prod" else scores
