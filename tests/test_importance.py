"""Scores against the formulas written out over gradients of single samples."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.importance import LLM_PRUNER_METRICS, TERMS, MetricPoint, score_groups
from adapruner.measurement.moments import measure_moments, removal_errors
from adapruner.measurement.taylor import measure
from adapruner.options import PruneConfig
from adapruner.run.options import register_extensions
from adapruner.structure.build import build_structure


@pytest.fixture
def measured(model, windows):
    structure = build_structure(model)
    errors = removal_errors(model, structure, dict(measure_moments(model, structure, windows)))
    measured = measure(model, structure, windows)
    return structure, replace(measured, **errors)


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
def test_llm_pruner_metrics(metric, model, windows, measured):
    structure, statistics = measured
    scores = score_groups(statistics, structure, LLM_PRUNER_METRICS[metric])
    for index, block in enumerate(structure.blocks):
        if block.kind == "channels" and block.layer in (0, 3):
            for channel in (0, 17):
                expected = channel_score(model, windows, block.layer, channel, metric)
                actual = float(scores[structure.group_offsets[index] + channel])
                assert math.isclose(actual, expected, rel_tol=1e-3)


def test_chosen_samples_are_all_that_counts(measured):
    structure, statistics = measured
    point = LLM_PRUNER_METRICS["vectorize"]
    both = score_groups(statistics.select([1, 4]), structure, point)
    by_hand = (statistics.taylor[1] + statistics.taylor[4]).abs().double() / 2
    expected = torch.zeros_like(both).index_add(0, structure.group_of_vector, by_hand)
    torch.testing.assert_close(both, expected)


# Those that are measured of experts are in tests/test_experts.py.
OF_ALL_MODELS = [name for name, term in TERMS.items() if "routing" not in term.needs]
# The errors of removal of a channel that is always zero are not: its moment is the damping, times its weights.
BY_INPUTS = [name for name in OF_ALL_MODELS if TERMS[name].family != "reconstruction"]
BY_OUTPUTS = [name for name in OF_ALL_MODELS if name != "conditional_variance"]


@pytest.mark.parametrize("term", OF_ALL_MODELS)
def test_every_term_is_not_negative_and_ignores_the_order_of_samples(term, measured):
    structure, statistics = measured
    compute, unit = TERMS[term].function, TERMS[term].unit
    values = compute(statistics)
    assert (values >= 0).all()
    assert (
        len(values)
        == {
            "vectors": len(structure.group_of_vector),
            "inputs": len(structure.group_of_input),
            "groups": structure.group_offsets[-1],
        }[unit]
    )
    torch.testing.assert_close(values, compute(statistics.select([3, 1, 0, 2, 5, 4])))


@pytest.mark.parametrize(
    ("term", "silent"), [(term, "inputs") for term in BY_INPUTS] + [(term, "outputs") for term in BY_OUTPUTS]
)
def test_what_takes_part_in_nothing_is_not_important(term, silent, model, windows):
    """A channel and a KV group score least of their block where they are always zero, and where their output weights
    are."""
    layer = model.model.layers[1]
    with torch.no_grad():
        if silent == "outputs":
            layer.mlp.down_proj.weight[:, 7] = 0
            layer.self_attn.o_proj.weight[:, 16:32] = 0
        else:
            for tensor in layer.mlp.up_proj.parameters():
                tensor[7] = 0
            for tensor in layer.self_attn.v_proj.parameters():
                tensor[8:16] = 0
    structure = build_structure(model)
    errors = removal_errors(model, structure, dict(measure_moments(model, structure, windows)))
    statistics = replace(measure(model, structure, windows), **errors)
    scores = score_groups(statistics, structure, MetricPoint(weights={term: 1}))
    heads, channels = (scores[structure.block_of_group == block] for block in (2, 3))
    assert int(heads.argmin()) == 1
    assert int(channels.argmin()) == 7


# Peers that rank by activations, as points of this space (see the terms for their sources).
ACTIVATION_METRICS = {
    "wanda_sp": MetricPoint(weights={"activation_norm": 1}, alignment="none"),
    "flap": MetricPoint(weights={"fluctuation": 1}, alignment="standard", reduction="mean"),
}


@pytest.mark.parametrize("metric", ACTIVATION_METRICS)
def test_peers_that_rank_by_activations(metric, model, windows, measured):
    """Wanda-sp and FLAP written out over all activations of one projection each."""
    structure, statistics = measured
    scores = score_groups(statistics, structure, ACTIVATION_METRICS[metric])
    for block, name in ((2, "self_attn.o_proj"), (3, "mlp.down_proj")):
        projection = model.model.layers[1].get_submodule(name)
        seen: list[Tensor] = []
        hook = projection.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            model(windows)
        hook.remove()
        x, weight = seen[0].double(), projection.weight.detach().double()
        if metric == "wanda_sp":
            per_input = weight.abs().sum(0) * x.norm(dim=0) / len(x) ** 0.5
            expected = per_input.view(structure.blocks[block].groups, -1).sum(1)
        else:
            per_input = x.var(0, unbiased=False) * weight.square().sum(0)
            standardised = (per_input - per_input.mean()) / per_input.std(unbiased=False)
            expected = standardised.view(structure.blocks[block].groups, -1).mean(1)
        torch.testing.assert_close(scores[structure.block_of_group == block], expected, rtol=1e-3, atol=1e-4)


def test_terms_of_second_moments_say_when_these_are_missing(model, windows):
    structure = build_structure(model)
    for term in ("reconstruction", "elimination"):
        with pytest.raises(AdaPrunerError, match="from second moments, which are missing"):
            score_groups(measure(model, structure, windows), structure, MetricPoint(weights={term: 1}))


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "prod"])
def test_reductions_by_brute_force(reduction, measured):
    structure, statistics = measured
    point = MetricPoint(weights={"fine_first": 1}, alignment="none", reduction=reduction)
    scores = score_groups(statistics, structure, point)
    values = statistics.element_absolute.mean(0).double()
    for group in range(0, structure.group_offsets[-1], 7):
        own = values[structure.group_of_vector == group]
        expected = {"sum": own.sum(), "mean": own.mean(), "max": own.max(), "prod": own.prod() ** (1 / len(own))}[
            reduction
        ]
        assert math.isclose(float(scores[group]), float(expected), rel_tol=1e-6)


def test_alignment_makes_scores_independent_of_scale(measured):
    """A loss in other units scales first-order terms by c and second-order ones by c²; aligned mixes do not care."""
    structure, statistics = measured
    scaled = replace(
        statistics,
        taylor=statistics.taylor * 1e-3,
        element_absolute=statistics.element_absolute * 1e-3,
        element_squared=statistics.element_squared * 1e-6,
    )
    point = MetricPoint(weights={"coarse_first": 0.3, "coarse_second": 0.2, "fine_first": 1, "fine_second": 2})
    torch.testing.assert_close(
        score_groups(scaled, structure, point), score_groups(statistics, structure, point), rtol=1e-4, atol=0
    )
    for block, (start, end) in enumerate(zip(structure.group_offsets, structure.group_offsets[1:], strict=False)):
        single = MetricPoint(weights={"fine_second": 1.0})
        total = float(score_groups(statistics, structure, single)[start:end].sum())
        assert math.isclose(total, structure.blocks[block].groups, rel_tol=1e-6)


def test_points_that_mean_nothing_are_refused():
    with pytest.raises(ValidationError, match="unknown importance terms"):
        MetricPoint(weights={"fine_frist": 1})
    for weights in ({"fine_first": -1.0}, {"fine_first": 0.0}, {}):
        with pytest.raises(ValidationError, match="must be positive"):
            MetricPoint(weights=weights)


def test_a_plugin_is_imported_only_if_it_is_named(tmp_path, monkeypatch):
    """A package with two modules, each an entry point, as it is installed."""
    for name in ("named", "unnamed"):
        (tmp_path / f"plugin_{name}.py").write_text(
            "from adapruner.importance import register_term\n\n"
            "@register_term(unit='inputs', family='plugin')\n"
            f"def of_{name}(statistics):\n    return statistics.column_squared\n"
        )
    about = tmp_path / "plugins-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[adapruner]\nnamed = plugin_named\nunnamed = plugin_unnamed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    register_extensions(PruneConfig.from_options(model="m"))
    assert not {"plugin_named", "plugin_unnamed"} & set(sys.modules)
    register_extensions(PruneConfig.from_options(model="m", plugins="named"))
    monkeypatch.delitem(sys.modules, "plugin_named")
    assert TERMS.pop("of_named")
    assert "of_unnamed" not in TERMS
    assert "plugin_unnamed" not in sys.modules
    with pytest.raises(AdaPrunerError, match=r"has the plugin 'nmaed' .*named, unnamed"):
        register_extensions(PruneConfig.from_options(model="m", plugins=("nmaed",)))
