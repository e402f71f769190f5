"""Causal language models whose layers differ in heads and feed-forward channels.

This file is complete in itself: a pruned checkpoint carries a copy of it, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where adapruner is not installed.

A checkpoint keeps its `model_type` (`llama`, …) and lists in the config key `per_layer_config`, which transformers 5
defines, what each layer has less of. Here the layers of the stock model are built again, each from its own
`config.per_layer_config[i]`. Projections named in `added_biases` (paths within a layer) have a bias that the family
does not know.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    MODEL_MAPPING,
    BloomForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GemmaForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    OPTForCausalLM,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    StableLmForCausalLM,
)
from transformers.pytorch_utils import Conv1D

FILE_NAME = "modeling_pruned.py"


@dataclass(frozen=True)
class _Family:
    """What must be known of a stock model to build its layers in other sizes.

    Attributes:
        layers: path of the list of layers.
        attention, attention_output: in families whose attention is always as wide as the hidden size, its path within a
            layer and the name of its output projection.
        feed_forward: in families whose config has no field for them, the paths of the two feed-forward projections.
    """

    stock_class: type[PreTrainedModel]
    layers: str = "model.layers"
    attention: str | None = None
    attention_output: str | None = None
    feed_forward: tuple[str, str] | None = None


_FAMILIES = (
    _Family(LlamaForCausalLM),
    _Family(MistralForCausalLM),
    _Family(Qwen2ForCausalLM),
    _Family(Qwen3ForCausalLM),
    _Family(GemmaForCausalLM),
    _Family(Gemma2ForCausalLM),
    _Family(Gemma3ForCausalLM),
    _Family(Phi3ForCausalLM),
    _Family(Olmo2ForCausalLM),
    _Family(GraniteForCausalLM),
    _Family(StableLmForCausalLM, attention="self_attn", attention_output="o_proj"),
    _Family(GPTNeoXForCausalLM, "gpt_neox.layers", "attention", "dense"),
    _Family(OPTForCausalLM, "model.decoder.layers", "self_attn", "out_proj"),
    _Family(GPT2LMHeadModel, "transformer.h", "attn", "c_proj"),
    _Family(BloomForCausalLM, "transformer.h", "self_attention", "dense", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
)


class _PerLayer:
    """Mixin over a stock model, with or without language modelling head."""

    family: _Family
    layers_path: str

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(_one_layer_config(config))
        config._attn_implementation = self.config._attn_implementation
        layers = self.get_submodule(self.layers_path)
        layer_class = type(layers[0])
        del layers[0]
        # What computes positions keeps the config of the stock model: it asks for sizes that layers may differ in.
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
        for index in range(config.num_hidden_layers):
            layer = _build_layer(layer_class, self.family, config, index)
            for module in layer.modules():
                if hasattr(module, "config"):
                    module.config = _LayerConfig(config, index)
            layers.append(layer)
        self.post_init()

    def save_pretrained(self, save_directory: str | Path, *arguments: object, **options: object) -> None:
        """As in transformers; the folder gets this file too, and says so."""
        self.config.auto_map = dict(self.auto_map)
        super().save_pretrained(save_directory, *arguments, **options)
        if Path(save_directory).is_dir():
            text = Path(__file__).read_text(encoding="utf-8")
            own_line = _REGISTERED.get(type(self), "")
            (Path(save_directory) / FILE_NAME).write_text(
                text if own_line in text else f"{text}\n{own_line}", encoding="utf-8"
            )


class _LayerConfig:
    """What a layer reads of its config while it runs: its own counts, and everything else from the config of the model,
    which `set_attn_implementation` changes."""

    def __init__(self, config: PreTrainedConfig, index: int) -> None:
        own = config.per_layer_config[index]
        self._own = {name: getattr(own, name) for name in config.per_layer_attributes or ()}
        self._of_model = config

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or "_own" not in self.__dict__:
            raise AttributeError(name)
        return self._own[name] if name in self._own else getattr(self._of_model, name)


def _one_layer_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that the stock class accepts: without overrides, and with one layer, which is built to be replaced."""
    shell = copy.copy(config)
    shell.per_layer_config = None
    shell.num_hidden_layers = 1
    return shell


def _build_layer(layer_class: type[nn.Module], family: _Family, config: PreTrainedConfig, index: int) -> nn.Module:
    own = config.per_layer_config[index]
    if family.attention is None:
        layer = layer_class(own, index)
    else:
        layer = layer_class(_with_all_heads(own, config), index)
        _narrow_attention(layer.get_submodule(family.attention), layer, family, own, index)
    if family.feed_forward:
        up, down = family.feed_forward
        _resize(layer, up, outputs=own.intermediate_size)
        _resize(layer, down, inputs=own.intermediate_size)
    if getattr(own, "alibi_heads", None) is not None:
        layer.get_submodule(family.attention).register_forward_pre_hook(_alibi_of(own.alibi_heads), with_kwargs=True)
    for path in getattr(config, "added_biases", ()):
        _resize(layer, path, bias=True)
    return layer


def _with_all_heads(own: PreTrainedConfig, config: PreTrainedConfig) -> PreTrainedConfig:
    stock, whole = _one_layer_config(config), copy.copy(own)
    for field in ("num_attention_heads", "num_key_value_heads"):
        if hasattr(stock, field):
            setattr(whole, field, getattr(stock, field))
    return whole


def _narrow_attention(whole: nn.Module, layer: nn.Module, family: _Family, own: PreTrainedConfig, index: int) -> None:
    """An attention with less heads is that of a narrower model, with projections that reach to the hidden size."""
    narrow = copy.copy(own)
    narrow.hidden_size = own.num_attention_heads * own.head_dim
    attention = type(whole)(narrow, layer_idx=index)
    for name, child in list(attention.named_children()):
        if isinstance(child, (nn.Linear, Conv1D)):
            size = {"outputs" if name == family.attention_output else "inputs": own.hidden_size}
            _resize(attention, name, **size)
    layer.set_submodule(family.attention, attention)


def _resize(
    parent: nn.Module, path: str, inputs: int | None = None, outputs: int | None = None, bias: bool = False
) -> None:
    """Replaces a projection by one of another size, or with a bias."""
    old = parent.get_submodule(path)
    if isinstance(old, Conv1D):
        new = Conv1D(outputs or old.nf, inputs or old.nx)
    else:
        new = nn.Linear(inputs or old.in_features, outputs or old.out_features, bias or old.bias is not None)
    parent.set_submodule(path, new.to(old.weight.dtype))


def _alibi_of(heads: list[int]):
    """A hook that hands an attention the slopes of its own heads, out of those of all heads of the model."""

    def select(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        alibi = kwargs["alibi"]  # [batch * all heads, 1, keys]
        own = alibi.unflatten(0, (len(args[0]), -1))[:, heads].flatten(0, 1)
        return args, kwargs | {"alibi": own}

    return select


def _accept_any_heads(self: PreTrainedConfig) -> None:
    """Whether the number of heads divides the hidden size means nothing once head_dim is given."""


def _validate_stock_rope(self: PreTrainedConfig) -> None:
    """Positions are those of the stock model, with all its heads."""
    shell = _one_layer_config(self)
    self.stock_class.validate_rope(shell)


def _pruned_classes(family: _Family) -> tuple[type, type, type]:
    """Config, decoder and causal language model of a family."""
    name = family.stock_class.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    stock_config = family.stock_class.config_class
    classes = {
        "AutoConfig": f"Pruned{name}Config",
        "AutoModel": f"Pruned{name}Model",
        "AutoModelForCausalLM": f"Pruned{name}ForCausalLM",
    }
    auto_map = {of: f"{FILE_NAME.removesuffix('.py')}.{own}" for of, own in classes.items()}
    own = {"__module__": __name__, "family": family, "auto_map": auto_map}
    validation = {"validate_architecture": _accept_any_heads, "validate_rope": _validate_stock_rope}
    of_config = {"__module__": __name__, "stock_class": stock_config} | validation
    config = strict(type(classes["AutoConfig"], (stock_config,), of_config))
    prefix = f"{family.stock_class.base_model_prefix}."
    decoder = type(
        classes["AutoModel"],
        (_PerLayer, MODEL_MAPPING[stock_config]),
        own | {"config_class": config, "layers_path": family.layers.removeprefix(prefix)},
    )
    causal = type(
        classes["AutoModelForCausalLM"],
        (_PerLayer, family.stock_class),
        own | {"config_class": config, "layers_path": family.layers},
    )
    return config, decoder, causal


STOCK_CLASSES = {}
PRUNED_CLASSES = {}
# The line that makes a class again, for those of families that are not above.
_REGISTERED = {}


def _add(family: _Family) -> tuple[type, type, type]:
    classes = _pruned_classes(family)
    globals().update({own.__name__: own for own in classes})
    model_type = family.stock_class.config_class.model_type
    STOCK_CLASSES[model_type], PRUNED_CLASSES[model_type] = family.stock_class, classes[-1]
    return classes


def register_family(
    stock_class: str, layers: str, attention: str | None = None, attention_output: str | None = None
) -> None:
    """Adds a family that is not in this file; its checkpoints get a copy of the file that ends in the same call.

    Args:
        stock_class: name of the causal language model in transformers.
        layers, attention, attention_output: see `_Family`.
    """
    classes = _add(_Family(getattr(transformers, stock_class), layers, attention, attention_output))
    line = f"register_family({stock_class!r}, {layers!r}, {attention!r}, {attention_output!r})\n"
    _REGISTERED.update(dict.fromkeys(classes, line))


for _family in _FAMILIES:
    _add(_family)
