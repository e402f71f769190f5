"""Folders whose layers differ follow the schema of transformers: stock config classes read them."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.checkpoint import save_checkpoint
from adapruner.families import learn
from adapruner.families.inference import random_model
from adapruner.model.architecture import known_architectures
from adapruner.structure.build import build_structure
from tiny_families import cut_to, tiny_config


@pytest.fixture
def folder(tokenizer, tmp_path):
    """Of twelve layers, the third has no attention; all others have lost other numbers of heads and channels."""

    def kept(block):
        lost = 2 * block.layer if block.kind == "channels" else block.layer % 2
        return 0 if (block.layer, block.kind) == (2, "heads") else block.groups - lost

    save_checkpoint(
        cut_to(random_model(tiny_config("llama", num_hidden_layers=12)), kept), tokenizer, tmp_path / "model"
    )
    return tmp_path / "model"


def test_stock_configs_read_the_layers(folder):
    layers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["per_layer_config"]
    assert layers["02"]["skip"] == ["attention"]
    assert 0 not in [count for fields in layers.values() for count in fields.values() if isinstance(count, int)]
    config = AutoConfig.from_pretrained(folder)
    assert type(config).__module__.startswith("transformers.")
    assert config.is_heterogeneous
    assert config.per_layer_config[11].intermediate_size == config.intermediate_size - 22


@pytest.mark.parametrize("model_type", [*known_architectures(), "qwen3_moe", "gpt_oss"])
def test_stock_classes_of_today_refuse_missing_attention(model_type, tokenizer, tmp_path):
    """They do not know `skip`, and would initialise what is missing at random. In two families they do so: there is no
    other count of an attention than the heads, which a config class that loads must be allowed to read."""
    config = tiny_config(model_type)
    learn(config)
    dense = random_model(config)
    if not build_structure(dense).architecture.removable_attention:
        pytest.skip("cannot lose its attention")
    pruned = cut_to(dense, lambda block: 0 if (block.layer, block.kind) == (2, "heads") else block.groups)
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    AutoConfig.from_pretrained(tmp_path / "model")
    if model_type in ("gpt2", "gpt_neox"):
        pytest.skip("loads with random weights")
    with pytest.raises(RuntimeError, match=r"per-layer attribute|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=False)


def test_a_count_of_zero_is_refused(folder):
    """Attention that a layer lacks is named in `skip`."""
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for layer in fields["per_layer_config"].values():
        if layer.pop("skip", ()):
            layer["num_key_value_heads"] = 0
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(AdaPrunerError, match=r"num_key_value_heads of layer \d: 0, which no model has"):
        adapruner.load(folder)
