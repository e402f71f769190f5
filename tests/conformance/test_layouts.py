"""Over every known family: a uniform layout is a stock model; added biases come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import adapruner
from adapruner.checkpoint import save_checkpoint
from adapruner.families import learn
from adapruner.families.inference import infer_architecture
from adapruner.families.proof import masked
from adapruner.families.tiny import random_model, tiny_config as shrunk_config
from adapruner.measurement import measure_moments
from adapruner.models import known_architectures, remember_family
from adapruner.structure import build_structure
from adapruner.surgery import Compensation, prune_model
from tiny_families import random_plan, tiny_config


@pytest.fixture(params=known_architectures())
def dense(request: pytest.FixtureRequest, make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model(request.param, num_hidden_layers=12)


# What the stock classes of a family cannot have less of: their attention is as wide as the hidden size, or there is no
# field for the channels.
NO_FEWER_HEADS = {"bloom", "gpt2", "gpt_neox", "opt", "stablelm"}
NO_FEWER_CHANNELS = {"bloom"}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def cut(
    dense: PreTrainedModel, windows: torch.Tensor, loses_heads: bool, form: str | None, layout: str = "uniform"
) -> PreTrainedModel:
    structure = build_structure(dense)
    more = 1 if layout == "per-layer" else 0
    lost = {"heads": lambda _: int(loses_heads), "channels": lambda layer: 8 + more * layer}
    plan = random_plan(structure, [block.groups - lost[block.kind](block.layer) for block in structure.blocks])
    moments = dict(measure_moments(dense, structure, windows))
    return prune_model(dense, structure, plan, Compensation(form, moments) if form else None)


@pytest.mark.parametrize("loses_heads", [False, True])
@pytest.mark.parametrize("form", [None, "least-squares"])
def test_a_uniform_layout_is_read_by_stock_transformers(
    loses_heads: bool,
    form: str | None,
    dense: PreTrainedModel,
    windows: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    pruned = cut(dense, windows, loses_heads, form)
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    is_stock = not (NO_FEWER_HEADS if loses_heads else NO_FEWER_CHANNELS) & {dense.config.model_type}
    assert is_stock == (type(pruned) is type(dense))
    assert is_stock != bool(list((tmp_path / "model").glob("*.py")))
    with torch.no_grad():
        expected = pruned(windows).logits
        assert torch.equal(adapruner.load(tmp_path / "model")(windows).logits, expected)
        if is_stock:
            assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "model")(windows).logits, expected)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("form", ["bias", "least-squares-bias"])
def test_added_biases_are_saved_and_loaded(
    layout: str,
    form: str,
    dense: PreTrainedModel,
    windows: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    pruned = cut(dense, windows, True, form, layout)
    biases = [pruned.get_submodule(block.row_wise.module).bias for block in build_structure(pruned).blocks]
    assert len(biases) == 24
    assert any(bias.any() for bias in biases)
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(adapruner.load(tmp_path / "model")(windows).logits, pruned(windows).logits)


@pytest.mark.parametrize("form", ["bias", "least-squares-bias"])
@pytest.mark.parametrize("family", ["jamba", "lfm2_moe", "qwen3_moe"])
def test_layers_of_other_kinds_have_no_place_for_added_biases(
    family: str, form: str, windows: torch.Tensor, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = tiny_config(family)
    if family == "qwen3_moe":
        config.mlp_only_layers = [0]
    remember_family(family, infer_architecture(config))
    dense = random_model(config)
    structure = build_structure(dense)
    counts = [block.groups - {"heads": 1, "channels": 20, "experts": 0}[block.kind] for block in structure.blocks]
    moments = dict(measure_moments(dense, structure, windows))
    pruned = prune_model(dense, structure, random_plan(structure, counts), Compensation(form, moments))
    projections = {block.row_wise.module for block in structure.blocks if block.is_projected}
    assert {name.split(".")[2] for name in projections} == set("0123" if family != "lfm2_moe" else "013")
    kept = dict(dense.named_parameters())
    added = {name for name, bias in pruned.named_parameters() if name not in kept and bias.any()}
    assert added == {f"{name}.bias" for name in projections}
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(adapruner.load(tmp_path / "model")(windows).logits, pruned(windows).logits)


def test_numbers_of_heads_that_a_stock_config_refuses(
    make_model: Callable[..., PreTrainedModel],
    windows: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """5 heads do not divide a hidden size of 48, which Llama's config refuses and Mistral's, for the same model, does
    not. A Mistral has no biases."""
    for biases, model_type in ((False, "mistral"), (True, "llama")):
        dense = make_model(
            "llama", 6, attention_bias=biases, mlp_bias=biases, rope_parameters=LLAMA3_ROPE, max_position_embeddings=64
        )
        structure = build_structure(dense)
        plan = random_plan(structure, [5 if block.kind == "heads" else 20 for block in structure.blocks])
        folder = tmp_path / model_type
        save_checkpoint(prune_model(dense, structure, plan), tokenizer, folder)
        with torch.no_grad(), masked(dense, structure, plan) as same:
            expected = same(windows).logits
            torch.testing.assert_close(adapruner.load(folder)(windows).logits, expected, rtol=1e-4, atol=1e-4)
            if not biases:
                stock = AutoModelForCausalLM.from_pretrained(folder)
                assert type(stock) is MistralForCausalLM
                assert torch.equal(stock(windows).logits, adapruner.load(folder)(windows).logits)
        assert json.loads((folder / "config.json").read_text())["model_type"] == model_type


def test_layers_that_differ_in_the_dense_model(
    windows: torch.Tensor, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of this Gemma 4, every sixth layer has other heads; transformers writes its number as "05" and "11"."""
    others = {layer: {"head_dim": 32, "num_key_value_heads": 1} for layer in (5, 11)}
    kinds = ["full_attention" if layer in others else "sliding_attention" for layer in range(12)]
    layers = {"num_hidden_layers": 12, "num_kv_shared_layers": 0, "layer_types": kinds, "per_layer_config": others}
    config = tiny_config("gemma4_text", **layers)
    shrunk = shrunk_config(config)
    assert shrunk.layer_types == ["sliding_attention", "full_attention"] * 2
    assert shrunk.to_dict()["per_layer_config"] == {layer: {"num_key_value_heads": 1} for layer in "13"}
    learn(config)
    dense = random_model(config)
    structure = build_structure(dense)
    counts = [block.groups - block.layer * (block.kind == "channels") for block in structure.blocks]
    plan = random_plan(structure, counts)
    save_checkpoint(prune_model(dense, structure, plan), tokenizer, tmp_path)
    with torch.no_grad(), masked(dense, structure, plan) as same:
        logits = adapruner.load(tmp_path)(windows).logits
        torch.testing.assert_close(logits, same(windows).logits, rtol=1e-3, atol=1e-3)
