"""A plugin of vLLM, which alone imports it: folders whose layers differ run in vLLM's own classes, without remote code.

`config.json` of such a folder names an architecture such as `PrunedLlamaForCausalLM`. Here it is vLLM's class of the
family, each layer built from its own `per_layer_config`. An attention that was removed is never built, and so has no KV
cache. Other families need `--trust-remote-code`, and run in vLLM's transformers backend.
"""

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


class _Family(NamedTuple):
    """Names in a module of `vllm.model_executor.models`.

    Attributes:
        model, layer, attention: classes; the attention is that which the layer builds.
        decoder: the class that holds the class of its layers as `decoder_layer_type`, if the model is not told it.
        fields: of the config of a layer, in addition.
    """

    module: str
    model: str
    layer: str
    attention: str
    decoder: str | None = None
    fields: Mapping[str, object] = MappingProxyType({})


FAMILIES = {
    "PrunedLlamaForCausalLM": _Family("llama", "LlamaForCausalLM", "LlamaDecoderLayer", "LlamaAttention"),
    "PrunedMistralForCausalLM": _Family("mistral", "MistralForCausalLM", "MistralDecoderLayer", "MistralAttention"),
    # The class for Qwen 2 divides the hidden size by the heads of the layer.
    "PrunedQwen2ForCausalLM": _Family(
        "llama", "LlamaForCausalLM", "LlamaDecoderLayer", "LlamaAttention", fields={"qkv_bias": True}
    ),
    "PrunedQwen3ForCausalLM": _Family(
        "qwen3", "Qwen3ForCausalLM", "Qwen3DecoderLayer", "Qwen3Attention", decoder="Qwen3Model"
    ),
    "PrunedGemma3ForCausalLM": _Family("gemma3", "Gemma3ForCausalLM", "Gemma3DecoderLayer", "Gemma3Attention"),
}
# Sizes that the workers of a model share.
_SHARED = {"intermediate_size": "channels", "num_attention_heads": "heads", "num_key_value_heads": "KV heads"}


def is_built(config: PreTrainedConfig) -> bool:
    """True if vLLM runs pruned folders of this model, itself pruned or not, in its own classes by this plugin."""
    return f"Pruned{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)}" in FAMILIES


def register() -> None:
    """Called by vLLM in each of its processes (entry point `vllm.general_plugins`)."""
    from vllm import ModelRegistry

    for name in FAMILIES:
        ModelRegistry.register_model(name, f"{__name__}:{name}")


def __getattr__(name: str) -> type[nn.Module]:
    """The class of an architecture, made when vLLM asks for it."""
    if name not in FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _model_class(name)


@cache
def _model_class(name: str) -> type[nn.Module]:
    family = FAMILIES[name]
    module = importlib.import_module(f"vllm.model_executor.models.{family.module}")
    try:
        stock, layer = getattr(module, family.model), _layer_class(module, family)
        owner = getattr(module, family.decoder) if family.decoder else module
    except AttributeError as error:
        raise ImportError(
            f"this vLLM has no {error.name}, from which adapruner builds {name}: upgrade vLLM, or serve the folder with"
            " --trust-remote-code and VLLM_PLUGINS=''"
        ) from None
    is_told = "layer_type" in inspect.signature(stock.__init__).parameters

    def build(self: nn.Module, *, vllm_config: Any, prefix: str = "") -> None:
        check_workers(vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size)
        if is_told:
            stock.__init__(self, vllm_config=vllm_config, prefix=prefix, layer_type=layer)
            return
        with _replaced(owner, "decoder_layer_type" if family.decoder else family.layer, layer):
            stock.__init__(self, vllm_config=vllm_config, prefix=prefix)

    return type(name, (stock,), {"__module__": __name__, "__init__": build})


def _layer_class(module: Any, family: _Family) -> type[nn.Module]:
    """The class of a family's layers, each built from its own config."""
    stock = getattr(module, family.layer)
    signature = inspect.signature(stock.__init__)

    def build(self: nn.Module, *arguments: Any, **named: Any) -> None:
        given = signature.bind(self, *arguments, **named)
        whole = given.arguments.get("config") or given.arguments["vllm_config"].model_config.hf_config
        config = whole.per_layer_config[int(given.arguments["prefix"].rsplit(".", 1)[1])]
        for name, value in family.fields.items():
            setattr(config, name, value)
        given.arguments["config"] = config
        with contextlib.ExitStack() as stack:
            if "attention" in config.skip:
                stack.enter_context(_replaced(module, family.attention, Nothing))
                if "attn_layer_type" in signature.parameters:
                    given.arguments["attn_layer_type"] = Nothing
            stock.__init__(*given.args, **given.kwargs)

    return type(f"Pruned{family.layer}", (stock,), {"__module__": __name__, "__init__": build})


def check_workers(config: Any, workers: int) -> None:
    """Refuses a number of tensor-parallel workers that does not divide what a layer has."""
    for index, layer in enumerate(config.per_layer_config):
        for field, what in _SHARED.items():
            size = getattr(layer, field)
            is_copied = field == "num_key_value_heads" and workers % size == 0  # vLLM copies few KV heads
            is_absent = "attention" in layer.skip and field != "intermediate_size"
            if size % workers and not is_copied and not is_absent:
                raise ValueError(
                    f"layer {index} has {size:,} {what}, which {workers} workers cannot share: choose a"
                    f" --tensor-parallel-size that divides it, or prune again with --tensor-parallel {workers}"
                )


class Nothing(nn.Module):
    """Replaces an attention: adds nothing to the hidden state."""

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__()

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, **named: object) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """An attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
