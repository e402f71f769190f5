"""Folders whose layers differ follow the schema of transformers: stock config classes read them today, and stock model
classes will, with a loader that builds each layer from `per_layer_config` and leaves out what is in `skip`."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import adapruner
from adapruner.checkpoint._folder import save_checkpoint
from adapruner.errors import AdaPrunerError
from adapruner.families import learn
from adapruner.families.tiny import random_model
from adapruner.models._architecture import known_architectures
from adapruner.structure._blocks import Block
from adapruner.structure._build import build_structure
from tiny_families import cut_to, tiny_config

LAYERS = 12
ATTENTION = ("self_attn", "input_layernorm")
# The modules of a layer that do nothing where attention is skipped. Where the output is normalized too, that norm is
# one of them.
SKIPPED = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gpt_oss"), ATTENTION),
    "gemma3_text": (*ATTENTION, "post_attention_layernorm"),
}


def pruned(model_type: str) -> PreTrainedModel:
    """Of twelve layers, the third has no attention, the eleventh neither heads nor channels less; of all others, every
    second has lost heads, and each another number of channels and experts."""
    sizes = {"num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS}
    config = tiny_config(model_type)
    names = set(config.to_dict())
    config = tiny_config(model_type, **{name: size for name, size in sizes.items() if name in names})
    learn(config)
    dense = random_model(config)
    can_lose_attention = build_structure(dense).architecture.removable_attention

    def kept(block: Block) -> int:
        lost = 2 * block.layer if block.kind == "channels" else block.layer % 2
        is_removed = can_lose_attention and (block.layer, block.kind) == (2, "heads")
        return 0 if is_removed else block.groups - lost * (block.layer != 10)

    return cut_to(dense, kept)


class Skipped(nn.Module):
    """Returns zeros in place of an attention, and its input in place of a norm."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, hidden_states: torch.Tensor, **inputs: object) -> object:
        if "norm" in self.name:
            return hidden_states
        return torch.zeros_like(hidden_states), None


def load_as_stock(folder: Path) -> PreTrainedModel:
    """A stand-in of the loader that transformers will have: stock classes alone."""
    config = AutoConfig.from_pretrained(folder)
    alike = copy.deepcopy(config)
    alike.per_layer_config = None
    model = AutoModelForCausalLM.from_config(alike, dtype=torch.float32, attn_implementation="eager")
    layers = model.model.layers
    for index, dense_layer in enumerate(layers):
        layer_config = config.per_layer_config[index]
        layer_config._attn_implementation = "eager"
        layers[index] = type(dense_layer)(layer_config, index)
        for name in SKIPPED[config.model_type] if layer_config.skip else ():
            layers[index].set_submodule(name, Skipped(name))
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert all("norm" in name for name in unexpected), unexpected
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("model_type", SKIPPED)
def test_the_coming_loader_needs_no_code_of_ours(model_type, tokenizer, windows, tmp_path):
    model = pruned(model_type)
    save_checkpoint(model, tokenizer, tmp_path / "model")
    layers = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))["per_layer_config"]
    assert layers["02"]["skip"] == ["attention"]
    assert 0 not in [count for fields in layers.values() for count in fields.values() if isinstance(count, int)]
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert type(config).__module__.startswith("transformers.")
    assert config.is_heterogeneous
    with torch.no_grad():
        expected = adapruner.load(tmp_path / "model")(windows, use_cache=False).logits
        logits = load_as_stock(tmp_path / "model")(windows, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


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


def test_a_count_of_zero_is_refused(tokenizer, tmp_path):
    """Attention that a layer lacks is named in `skip`."""
    save_checkpoint(pruned("llama"), tokenizer, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for layer in fields["per_layer_config"].values():
        if layer.pop("skip", ()):
            layer["num_key_value_heads"] = 0
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(AdaPrunerError, match=r"num_key_value_heads of layer \d: 0, which no model has"):
        adapruner.load(tmp_path / "model")
