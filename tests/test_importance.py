"""Scores against the formulas written out over gradients of single samples."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.importance import LLM_PRUNER_METRICS, TERMS, MetricPoint, score_groups
from adapruner.measurement import Statistics, measure
from adapruner.structure import Structure, build_structure


@pytest.fixture
def measured(model: PreTrainedModel, windows: Tensor) -> tuple[Structure, Statistics]:
    structure = build_structure(model)
    return structure, measure(model, structure, windows)


def channel_score(model: PreTrainedModel, windows: Tensor, layer: int, channel: int, metric: str) -> float:
    """LLM-Pruner's score of one feed-forward channel, from one backward pass per sample."""
    mlp = model.model.layers[layer].mlp
    names = ("gate_proj", "up_proj", "down_proj")

    def vector(name: str, tensor: Tensor) -> Tensor:
        return tensor[:, channel] if name == "down_proj" else tensor[channel]

    per_sample: list[list[Tensor]] = []
    for window in windows:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        per_sample.append([vector(name, mlp.get_submodule(name).weight.grad) for name in names])
    score = 0.0
    with torch.no_grad():
        for index, name in enumerate(names):
            weight = vector(name, mlp.get_submodule(name).weight)
            g = torch.stack([sample[index] for sample in per_sample])
            score += {
                "vectorize": (g.mean(0) * weight).sum().abs(),
                "param_first": (g * weight).abs().sum(1).mean(),
                "param_second": ((g * weight) ** 2).mean(0).sum() / 2,
                "param_mix": (g * weight).abs().sum(1).mean() + ((g * weight) ** 2).mean(0).sum() / 2,
            }[metric].item()
    model.zero_grad()
    return score


@pytest.mark.parametrize("metric", LLM_PRUNER_METRICS)
def test_llm_pruner_metrics(
    metric: str, model: PreTrainedModel, windows: Tensor, measured: tuple[Structure, Statistics]
) -> None:
    structure, statistics = measured
    scores = score_groups(statistics, structure, LLM_PRUNER_METRICS[metric])
    for index, block in enumerate(structure.blocks):
        if block.kind == "channels" and block.layer in (0, 3):
            for channel in (0, 17):
                expected = channel_score(model, windows, block.layer, channel, metric)
                actual = float(scores[structure.group_offsets[index] + channel])
                assert math.isclose(actual, expected, rel_tol=1e-3)


def test_chosen_samples_are_all_that_counts(measured: tuple[Structure, Statistics]) -> None:
    structure, statistics = measured
    point = LLM_PRUNER_METRICS["vectorize"]
    both = score_groups(statistics.select([1, 4]), structure, point)
    by_hand = (statistics.taylor[1] + statistics.taylor[4]).abs().double() / 2
    expected = torch.zeros_like(both).index_add(0, structure.group_of_vector, by_hand)
    torch.testing.assert_close(both, expected)


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_not_negative_and_ignores_the_order_of_samples(
    term: str, measured: tuple[Structure, Statistics]
) -> None:
    _, statistics = measured
    values = TERMS[term](statistics)
    assert (values >= 0).all()
    assert values.shape == (statistics.taylor.shape[1],)
    torch.testing.assert_close(values, TERMS[term](statistics.select([3, 1, 0, 2, 5, 4])))


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "prod"])
def test_reductions_by_brute_force(reduction: str, measured: tuple[Structure, Statistics]) -> None:
    structure, statistics = measured
    point = MetricPoint(weights={"fine_first": 1}, alignment="none", reduction=reduction)
    scores = score_groups(statistics, structure, point)
    values = statistics.element_absolute.mean(0).double()
    for group in range(0, structure.group_offsets[-1], 7):
        own = values[structure.group_of_vector == group]
        expected = {
            "sum": own.sum(),
            "mean": own.mean(),
            "max": own.max(),
            "prod": own.prod() ** (1 / len(own)),
        }[reduction]
        assert math.isclose(float(scores[group]), float(expected), rel_tol=1e-6)


def test_alignment_makes_scores_independent_of_scale(measured: tuple[Structure, Statistics]) -> None:
    """A loss in other units scales first-order terms by c and second-order ones by c²; aligned mixes do not care."""
    structure, statistics = measured
    scaled = Statistics(
        statistics.taylor * 1e-3, statistics.element_absolute * 1e-3, statistics.element_squared * 1e-6, statistics.loss
    )
    point = MetricPoint(weights={"coarse_first": 0.3, "coarse_second": 0.2, "fine_first": 1, "fine_second": 2})
    torch.testing.assert_close(
        score_groups(scaled, structure, point), score_groups(statistics, structure, point), rtol=1e-4, atol=0
    )
    for block, (start, end) in enumerate(zip(structure.group_offsets, structure.group_offsets[1:], strict=False)):
        single = MetricPoint(weights={"fine_second": 1.0})
        vectors = int((structure.block_of_vector == block).sum())
        assert math.isclose(float(score_groups(statistics, structure, single)[start:end].sum()), vectors, rel_tol=1e-6)


def test_points_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="unknown importance terms"):
        MetricPoint(weights={"fine_frist": 1})
    for weights in ({"fine_first": -1.0}, {"fine_first": 0.0}, {}):
        with pytest.raises(ValidationError, match="must be positive"):
            MetricPoint(weights=weights)
