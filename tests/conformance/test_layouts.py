"""Over every known family: a uniform layout is a stock model; added biases come back."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralForCausalLM

import adapruner
from adapruner.checkpoint import save_checkpoint
from adapruner.families import learn
from adapruner.families.inference import random_model, tiny_config as shrunk_config
from adapruner.families.proof import masked
from adapruner.measurement.moments import measure_moments
from adapruner.model.architecture import known_architectures
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from tiny_families import random_plan, tiny_config


@pytest.fixture(params=known_architectures())
def dense(request, make_model):
    return make_model(request.param, num_hidden_layers=4)


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


@pytest.mark.parametrize("loses_heads", [False, True])
def test_a_compensated_uniform_layout_is_read_by_stock_transformers(loses_heads, dense, windows, tokenizer, tmp_path):
    """Without compensation: see test_support_table.py."""
    structure = build_structure(dense)
    lost = {"heads": int(loses_heads), "channels": 8}
    plan = random_plan(structure, [block.groups - lost[block.kind] for block in structure.blocks])
    pruned = prune_model(dense, structure, plan, dict(measure_moments(dense, structure, windows)))
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    is_stock = not (NO_FEWER_HEADS if loses_heads else NO_FEWER_CHANNELS) & {dense.config.model_type}
    assert is_stock == (type(pruned) is type(dense))
    assert is_stock != bool(list((tmp_path / "model").glob("*.py")))
    with torch.no_grad():
        expected = pruned(windows).logits
        assert torch.equal(adapruner.load(tmp_path / "model")(windows).logits, expected)
        if is_stock:
            assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "model")(windows).logits, expected)


def test_numbers_of_heads_that_a_stock_config_refuses(make_model, windows, tokenizer, tmp_path):
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


def test_layers_that_differ_in_the_dense_model(windows, tokenizer, tmp_path):
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
