"""Causal language models whose layers differ in heads and feed-forward channels.

This file is complete in itself: a pruned checkpoint carries a copy of it, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where adapruner is not installed.

A checkpoint keeps its `model_type` (`llama`, …) and lists in the config key `per_layer_config`, which transformers 5
defines, what each layer has less of. Here every layer is built from its own `config.per_layer_config[i]`. Projections
named in `added_biases` (paths within a layer) have a bias that the family does not know.
"""

from __future__ import annotations

import copy

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)


def _one_layer_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that the parent class accepts: without overrides, and with one layer, which is built to be replaced."""
    shell = copy.copy(config)
    shell.per_layer_config = None
    shell.num_hidden_layers = 1
    return shell


class _PerLayerModel:
    """Mixin over a decoder (`LlamaModel`, …): builds layer i from `config.per_layer_config[i]`."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(_one_layer_config(config))
        layer_class = type(self.layers[0])
        config._attn_implementation = self.config._attn_implementation
        self.config = config
        self.layers = nn.ModuleList(
            layer_class(config.per_layer_config[index], index) for index in range(config.num_hidden_layers)
        )
        for layer in self.layers:
            for path in getattr(config, "added_biases", ()):
                projection = layer.get_submodule(path)
                replaced = nn.Linear(projection.in_features, projection.out_features, bias=True)
                layer.set_submodule(path, replaced.to(projection.weight.dtype))
        # The layers read nothing from their config after construction but the attention implementation, which
        # `set_attn_implementation` changes on the model's own config: let them share that one.
        for module in self.layers.modules():
            if hasattr(module, "config"):
                module.config = config
        self.post_init()


class _PerLayerForCausalLM:
    """Mixin over a causal LM (`LlamaForCausalLM`, …): puts the per-layer decoder in the place of the plain one."""

    decoder_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(_one_layer_config(config))
        config._attn_implementation = self.config._attn_implementation
        self.config = config
        self.model = self.decoder_class(config)
        self.post_init()


@strict
class PrunedLlamaConfig(LlamaConfig):
    def validate_architecture(self) -> None:
        """Accept any number of heads: whether it divides the hidden size means nothing once head_dim is given."""


class PrunedLlamaModel(_PerLayerModel, LlamaModel):
    config_class = PrunedLlamaConfig


class PrunedLlamaForCausalLM(_PerLayerForCausalLM, LlamaForCausalLM):
    config_class = PrunedLlamaConfig
    decoder_class = PrunedLlamaModel


@strict
class PrunedMistralConfig(MistralConfig):
    def validate_architecture(self) -> None:
        """Accept any number of heads: whether it divides the hidden size means nothing once head_dim is given."""


class PrunedMistralModel(_PerLayerModel, MistralModel):
    config_class = PrunedMistralConfig


class PrunedMistralForCausalLM(_PerLayerForCausalLM, MistralForCausalLM):
    config_class = PrunedMistralConfig
    decoder_class = PrunedMistralModel


@strict
class PrunedQwen2Config(Qwen2Config):
    def validate_architecture(self) -> None:
        """Accept any number of heads: whether it divides the hidden size means nothing once head_dim is given."""


class PrunedQwen2Model(_PerLayerModel, Qwen2Model):
    config_class = PrunedQwen2Config


class PrunedQwen2ForCausalLM(_PerLayerForCausalLM, Qwen2ForCausalLM):
    config_class = PrunedQwen2Config
    decoder_class = PrunedQwen2Model


@strict
class PrunedQwen3Config(Qwen3Config):
    def validate_architecture(self) -> None:
        """Accept any number of heads: whether it divides the hidden size means nothing once head_dim is given."""


class PrunedQwen3Model(_PerLayerModel, Qwen3Model):
    config_class = PrunedQwen3Config


class PrunedQwen3ForCausalLM(_PerLayerForCausalLM, Qwen3ForCausalLM):
    config_class = PrunedQwen3Config
    decoder_class = PrunedQwen3Model


PRUNED_CLASSES = {
    model_class.config_class.model_type: model_class
    for model_class in (
        PrunedLlamaForCausalLM,
        PrunedMistralForCausalLM,
        PrunedQwen2ForCausalLM,
        PrunedQwen3ForCausalLM,
    )
}
