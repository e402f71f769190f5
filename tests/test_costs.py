"""Bytes and seconds of pruned models before they exist, against files that are written, caches that are filled and
times that are known."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from scipy.optimize import isotonic_regression
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from adapruner.checkpoint import save_checkpoint
from adapruner.costs import Latencies, cache_bytes, check_latencies, measure_latencies, measured_model, read_latencies
from adapruner.costs._bytes import memory_costs, safetensors_bytes, shapes_after, stored_shapes
from adapruner.costs._latency import _rising
from adapruner.errors import AdaPrunerError
from adapruner.families import learn
from adapruner.gguf import gguf_bytes
from adapruner.models import empty_model
from adapruner.planning import make_plan
from adapruner.structure import Structure, build_structure
from adapruner.surgery import prune_model
from tiny_families import tiny_config

MakeModel = Callable[..., PreTrainedModel]


def pruned(model: PreTrainedModel, structure: Structure, counts: list[int]) -> PreTrainedModel:
    return prune_model(model, structure, make_plan(structure, torch.zeros(structure.group_offsets[-1]), counts))


def some_counts(structure: Structure, seed: int) -> list[int]:
    """How many groups are kept: any number that is possible, and none where a part may be removed whole."""
    generator = random.Random(seed)
    whole = {"heads": "attention", "channels": "feed-forward"}
    counts = []
    for block in structure.blocks:
        least = 0 if whole.get(block.kind) in structure.whole and not block.experts else block.least
        counts.append(block.strata * generator.randint(-(-least // block.strata), block.groups // block.strata))
    return counts


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "olmo2", "phi3", "qwen3"])
def test_shapes_are_those_of_the_pruned_model(family: str, make_model: MakeModel) -> None:
    model = empty_model(make_model(family).config)
    structure = build_structure(model)
    for seed in range(4):
        counts = some_counts(structure, seed)
        assert shapes_after(model, structure, counts) == stored_shapes(pruned(model, structure, counts))


def test_shapes_without_a_layer_and_with_query_heads(make_model: MakeModel) -> None:
    model = empty_model(make_model().config)
    structure = build_structure(model, "query-head")
    counts = [0 if block.layer == 1 else block.groups // 2 for block in structure.blocks]
    shapes = shapes_after(model, structure, counts)
    assert shapes == stored_shapes(pruned(model, structure, counts))
    assert not any(name.startswith("model.layers.3.") for name in shapes)


@pytest.mark.parametrize("granularity", ["expert", "channel"])
def test_shapes_of_a_mixture(granularity: Any) -> None:
    config = tiny_config("qwen3_moe")
    learn(config)
    model = empty_model(config)
    structure = build_structure(model, experts=granularity)
    fewer = {"experts": 3, "channels": 4 * 24}
    counts = [fewer.get(block.kind, block.groups) for block in structure.blocks]
    assert shapes_after(model, structure, counts) == stored_shapes(pruned(model, structure, counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_safetensors_are_those_of_the_file(
    dtype: torch.dtype, tied: bool, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model(tie_word_embeddings=tied).to(dtype)
    structure = build_structure(model)
    counts = some_counts(structure, 0)
    save_checkpoint(pruned(model, structure, counts), tokenizer, tmp_path / "model")
    written = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert safetensors_bytes(shapes_after(model, structure, counts), dtype) == written


@pytest.mark.parametrize("granularity", ["kv-group", "query-head"])
@pytest.mark.parametrize("sliding", [False, True])
def test_memory_of_the_cache_is_that_of_the_cache(granularity: Any, sliding: bool, make_model: MakeModel) -> None:
    model = make_model("gemma3_text") if sliding else make_model()
    structure, batch, context = build_structure(model, granularity), 3, 20
    counts = [max(block.strata, block.groups // 3) for block in structure.blocks]
    counts[2] = 0 if "attention" in structure.whole else counts[2]
    smaller = pruned(model, structure, counts)
    cache = DynamicCache(config=smaller.config)
    with torch.no_grad():
        smaller(torch.zeros(batch, context, dtype=torch.long), **{name_of_cache(smaller): cache})
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)
    empty = empty_model(model.config)
    costs = memory_costs(structure, lambda counts: 1000.0, cache_bytes(empty, batch, context, torch.float32))
    assert costs(counts) == 1000 + held
    assert sum(cache_bytes(empty_model(smaller.config), batch, context, torch.float32)) == held


def name_of_cache(model: PreTrainedModel) -> str:
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def known_seconds(model: PreTrainedModel) -> float:
    """A machine that takes so long for a model, a layer, a head and a channel."""
    blocks = build_structure(model).blocks
    of_kind = {"heads": 0.07, "channels": 0.003}
    return 2.0 + 0.5 * model.config.num_hidden_layers + sum(of_kind[block.kind] * block.groups for block in blocks)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("layers", [2, 4])
def test_predicted_seconds_are_those_of_a_machine_that_is_linear(
    family: str, layers: int, make_model: MakeModel
) -> None:
    model = empty_model(make_model(family).config)
    structure, rounds = build_structure(model), count()

    def timer(models: Mapping[str, PreTrainedModel]) -> dict[str, float]:
        # It becomes slower and slower, for both of a pair alike.
        factor = 1 + 1e-9 * next(rounds)
        return {name: factor * known_seconds(one) for name, one in models.items()}

    make = partial(measured_model, model.config, dtype=torch.bfloat16, device=torch.device("cpu"))
    costs = measure_latencies(structure, make, layers, timer, {}).costs(structure)
    whole = {"attention", "feed-forward"} <= structure.whole
    least = {block.kind: 0 if whole else block.groups // 4 for block in structure.blocks}
    for seed in range(4):
        counts = [
            max(kept, least[block.kind])
            for block, kept in zip(structure.blocks, some_counts(structure, seed), strict=True)
        ]
        assert costs(counts) == pytest.approx(known_seconds(pruned(model, structure, counts)), rel=1e-6)
    if "layer" in structure.whole:
        counts = [0 if block.layer == 2 else block.groups for block in structure.blocks]
        assert costs(counts) == pytest.approx(known_seconds(pruned(model, structure, counts)), rel=1e-6)


def test_latencies_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    about = {"device": "cpu", "phase": "prefill", "model": {"model_type": "llama"}}
    measured = Latencies(about=about, seconds=2.0, of_layer=0.5, added={"channels": {8: -0.25, 24: 0.0}})
    calls: list[int] = []

    def measure() -> Latencies:
        calls.append(1)
        return measured

    assert read_latencies(about, measure) == read_latencies(about, measure) == measured
    assert len(calls) == 1
    read_latencies(about | {"phase": "decode"}, measure)
    assert len(calls) == 2
    (file, _) = sorted(tmp_path.rglob("*.json"))
    file.write_text("{")
    assert read_latencies(about, measure) == read_latencies(about | {"phase": "decode"}, measure) == measured
    assert len(calls) == 3


def test_layers_that_differ_have_no_latencies(make_model: MakeModel) -> None:
    model = make_model()
    structure = build_structure(model)
    check_latencies(structure)
    with pytest.raises(AdaPrunerError, match="layers of this model differ"):
        check_latencies(build_structure(pruned(model, structure, some_counts(structure, 0))))
    learn(config := tiny_config("qwen3_moe"))
    with pytest.raises(AdaPrunerError, match="experts"):
        check_latencies(build_structure(empty_model(config)))


def test_a_gguf_file_of_a_family_that_cannot_be_written_is_refused(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(AdaPrunerError, match="GGUF export knows"):
        gguf_bytes(empty_model(make_model("gpt2").config), tokenizer, "q8_0")


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
def test_times_rise_with_the_width(values: list[float]) -> None:
    found = _rising(dict(enumerate(values)))
    expected = isotonic_regression(values).x
    assert list(found.values()) == pytest.approx(expected - expected[-1], abs=1e-12)
