"""The plugin of vLLM, without vLLM: its classes are replaced by ones that build nothing."""

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace

import pytest
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

import adapruner
from adapruner.checkpoint import save_checkpoint
from adapruner.families.inference import random_model
from adapruner.vllm import Nothing, check_workers
from tiny_families import cut_to, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Twelve layers, the first and the third without attention, the others with fewer and fewer channels."""
    model = random_model(tiny_config("llama", num_hidden_layers=12))
    lost = {"heads": lambda layer: layer in (0, 2), "channels": lambda layer: layer / 24}
    pruned = cut_to(model, lambda block: round(block.groups * (1 - lost[block.kind](block.layer))))
    path = tmp_path_factory.mktemp("pruned") / "model"
    save_checkpoint(pruned, tokenizer, path)
    return path


@pytest.fixture
def vllm_models(monkeypatch):
    """A module of vLLM's models, as 0.32 has it: layers say what they are built from."""
    module = ModuleType("vllm.model_executor.models.llama")

    class LlamaAttention(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.heads = config.num_attention_heads

    class LlamaDecoderLayer(nn.Module):
        def __init__(self, vllm_config, prefix="", config=None, attn_layer_type=LlamaAttention):
            super().__init__()
            config = config or vllm_config.model_config.hf_config
            self.channels, self.self_attn = config.intermediate_size, attn_layer_type(config=config)

    class LlamaForCausalLM(nn.Module):
        def __init__(self, *, vllm_config, prefix="", layer_type=LlamaDecoderLayer):
            super().__init__()
            count = vllm_config.model_config.hf_config.num_hidden_layers
            self.layers = nn.ModuleList(layer_type(vllm_config, prefix=f"model.layers.{i}") for i in range(count))

    for made in (LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM):
        setattr(module, made.__name__, made)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_vllm_finds_the_architectures_that_folders_name(monkeypatch):
    registered = {}
    fake = SimpleNamespace(ModelRegistry=SimpleNamespace(register_model=registered.__setitem__))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="adapruner")
    entry.load()()
    stock = [CONFIG_MAPPING[name] for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")]
    assert registered == {
        name: f"adapruner.vllm:{name}"
        for name in (f"Pruned{MODEL_FOR_CAUSAL_LM_MAPPING[config].__name__}" for config in stock)
    }


def test_every_layer_is_built_from_its_own_sizes(folder, vllm_models):
    config, loaded = AutoConfig.from_pretrained(folder), adapruner.load(folder)
    assert config.architectures == ["PrunedLlamaForCausalLM"]
    whole = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config), parallel_config=SimpleNamespace(tensor_parallel_size=1)
    )
    built = sys.modules["adapruner.vllm"]._model_class.__wrapped__("PrunedLlamaForCausalLM")(vllm_config=whole)
    assert [layer.channels for layer in built.layers] == [
        layer.mlp.gate_proj.out_features for layer in loaded.model.layers
    ]
    without = [isinstance(layer.self_attn, Nothing) for layer in built.layers]
    assert without == [not hasattr(layer.self_attn, "q_proj") for layer in loaded.model.layers]
    assert {True, False} == {*without}


def test_workers_that_cannot_share_a_layer_are_refused(folder):
    config = AutoConfig.from_pretrained(folder)
    check_workers(config, 1)
    with pytest.raises(ValueError, match=r"layer \d has [\d,]+ \w+, which 7 workers cannot share"):
        check_workers(config, 7)


def test_a_vllm_without_a_class_is_named(vllm_models):
    del vllm_models.LlamaDecoderLayer
    with pytest.raises(ImportError, match="this vLLM has no LlamaDecoderLayer"):
        sys.modules["adapruner.vllm"]._model_class.__wrapped__("PrunedLlamaForCausalLM")
