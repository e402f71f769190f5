"""Causal language models whose layers differ in heads and feed-forward channels, or have no attention.

This file is standalone: a pruned checkpoint has a copy of it, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works without adapruner.

A checkpoint keeps its `model_type` (`llama`, …) and lists the reduced sizes of each layer in the config key
`per_layer_config`, which transformers 5 defines; a layer without attention has `"skip": ["attention"]`. Here the layers
of the stock model are rebuilt, each from `config.per_layer_config[i]`.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import NamedTuple

import transformers
from huggingface_hub.dataclasses import strict
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_torch_available

# Older ones would fail at the imports below, or build layers of the wrong sizes.
if Version(transformers.__version__) < Version("5.14"):
    raise ImportError(
        "The layers of this model differ in size, which needs transformers 5.14 or newer; installed is"
        f" {transformers.__version__}. Install a newer one: pip install --upgrade 'transformers>=5.14'"
    )


# Without PyTorch (mlx-lm), a tokenizer is loaded with the config class alone.
if is_torch_available():
    import torch
    from torch import nn
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.pytorch_utils import Conv1D

    class Nothing(nn.Module):
        """Replaces an attention: adds nothing to the hidden state, and has no cache."""

        def __init__(self, returned: int) -> None:
            super().__init__()
            self.returned = returned

        def forward(self, *args: object, **kwargs: object) -> torch.Tensor | tuple:
            state = next(argument for argument in (*args, *kwargs.values()) if isinstance(argument, torch.Tensor))
            nothing = torch.zeros_like(state)
            return (nothing, *[None] * (self.returned - 1)) if self.returned else nothing


FILE_NAME = "modeling_pruned.py"
# The counterpart for mlx-lm, which the config names as `model_file`.
MLX_FILE_NAME = "mlx_pruned.py"
# The entry in the `skip` of a layer without attention.
ATTENTION = "attention"


class Family(NamedTuple):
    """The data that is needed to build the layers of a stock model in other sizes; paths are relative to a layer.

    Attributes:
        layers: path of the list of layers in the causal language model.
        attention_output: output projection of the attention, in families whose attention is always as wide as the
            hidden size.
        feed_forward: feed-forward projections, in families whose config has no field for their width; the last one
            reads the channels.
        channels: config field for the width of the feed-forward projections.
        attention: the attention, which a layer may lack; None if the family has none.
        returned: number of values that the attention returns, the first of which is added to the hidden state; 0 if it
            returns a single tensor.
    """

    model_type: str
    layers: str
    attention_output: str | None
    feed_forward: tuple[str, ...]
    channels: str
    attention: str | None
    returned: int


class Wrapper(NamedTuple):
    """A multimodal model around a decoder.

    Attributes:
        text: name of the decoder's config in the config of the multimodal model.
        layers: path of the list of decoder layers in the multimodal model.
    """

    model_type: str
    text: str
    layers: str


class _Saved:
    """Mixin that saves the code of a model with it."""

    registration: str  # the line of code that makes the classes of the model

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Transformers looks for a decorator in the file of the class, which is that of the stock class."""
        stock = (base for base in cls.__mro__ if issubclass(base, PreTrainedModel) and not issubclass(base, _Saved))
        return next(stock)._can_set_experts_implementation()

    def save_pretrained(self, save_directory: str | Path, *arguments: object, **options: object) -> None:
        """Saves as in transformers; the folder also gets this file, with a line that registers these classes, and the
        file for mlx-lm, if it is next to this one and there are no other models beside the decoder."""
        text = self.config.get_text_config(decoder=True)
        self.config.auto_map = dict(self.auto_map)
        try:
            text.stock_class.from_dict(text.to_dict())
        except RuntimeError:  # of transformers: the stock class reads a size in which layers differ
            # It then reads that size of the dense model.
            text.__dict__["allow_global_per_layer_attribute_access"] = True
        for_mlx = Path(__file__).with_name(MLX_FILE_NAME)
        is_for_mlx = for_mlx.is_file() and text is self.config
        self.config.model_file = MLX_FILE_NAME if is_for_mlx else None
        super().save_pretrained(save_directory, *arguments, **options)
        if Path(save_directory).is_dir():
            if is_for_mlx:
                shutil.copyfile(for_mlx, Path(save_directory) / MLX_FILE_NAME)
            code, line = Path(__file__).read_text(encoding="utf-8"), f"\n\n{self.registration}\n"
            (Path(save_directory) / FILE_NAME).write_text(code.removesuffix(line) + line, encoding="utf-8")


class _PerLayer(_Saved):
    """Mixin over a stock model, with or without a language modelling head."""

    family: Family

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(_stock_config(config))
        config._attn_implementation, experts = self.config._attn_implementation, self.config._experts_implementation
        layers = self.base_model.get_submodule(self.family.layers.removeprefix(f"{self.base_model_prefix}."))
        # Modules that compute positions keep the config of the stock model: they read sizes in which layers may differ.
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
        _rebuild_layers(layers, self.family, config)
        config._experts_implementation = _fitting(experts, layers)
        self.post_init()


class _AroundPerLayer(_Saved):
    """Mixin over a stock multimodal model, around a decoder whose layers differ."""

    family: Family
    wrapper: Wrapper

    def __init__(self, config: PreTrainedConfig) -> None:
        stock, text = copy.copy(config), getattr(config, self.wrapper.text)
        # Multimodal models choose the class of their decoder by a config of a stock class.
        stock_text = text.stock_class.from_dict(without_layers(text.to_dict()))
        stock_text._attn_implementation = text._attn_implementation
        setattr(stock, self.wrapper.text, stock_text)
        super().__init__(stock)
        experts = stock_text._experts_implementation
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and isinstance(module.config, text.stock_class):
                text._attn_implementation = module.config._attn_implementation
                module.config = text
            elif isinstance(module, PreTrainedModel) and isinstance(module.config, type(config)):
                module.config = config
        layers = self.get_submodule(self.wrapper.layers)
        _rebuild_layers(layers, self.family, text)
        text._experts_implementation = _fitting(experts, layers)
        self.post_init()


def _fitting(experts: str | None, layers: nn.ModuleList) -> str | None:
    """The way to compute experts that transformers chose, unless its grouped products want rows of n · 16 bytes."""
    stacks = [weight for weight in layers.parameters() if weight.dim() == 3]
    is_odd = any(size * stack.element_size() % 16 for stack in stacks for size in stack.shape[1:])
    return "eager" if is_odd and experts == "grouped_mm" else experts


def _rebuild_layers(layers: nn.ModuleList, family: Family, config: PreTrainedConfig) -> None:
    """Replaces the layers of a stock decoder by layers of the sizes in a config."""
    for index, stock in enumerate(layers):
        layers[index] = layer = _build_layer(type(stock), family, config, index)
        for module in layer.modules():
            if hasattr(module, "config"):
                module.config = _LayerConfig(config, index)
    _renumber_caches(layers, family, config)


class _LayerConfig:
    """The config that a running layer reads: the counts of the layer, and everything else from the config of the model,
    which `set_attn_implementation` changes."""

    def __init__(self, config: PreTrainedConfig, index: int) -> None:
        layer_config = config.per_layer_config[index]
        self._counts = {name: getattr(layer_config, name) for name in config.per_layer_attributes or ()}
        self._config = config

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return self._counts[name] if name in self._counts else getattr(self._config, name)


def _stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that the stock class accepts, without overrides."""
    stock = copy.copy(config)
    # In some families, layers already differ in the dense model.
    stock.per_layer_config = getattr(config, "stock_per_layer_config", None)
    return stock


def without_layers(fields: dict) -> dict:
    """The fields of a config with the layers of the dense model."""
    layers = {"per_layer_config": fields.get("stock_per_layer_config")}
    omitted = ("per_layer_config", "stock_per_layer_config", "allow_global_per_layer_attribute_access")
    return {name: value for name, value in fields.items() if name not in omitted} | layers


def _build_layer(layer_class: type[nn.Module], family: Family, config: PreTrainedConfig, index: int) -> nn.Module:
    layer_config, stock = config.per_layer_config[index], _stock_config(config)
    if family.attention_output is None:
        layer = layer_class(layer_config, index)
    else:
        complete = copy.copy(layer_config)
        for field in ("num_attention_heads", "num_key_value_heads"):
            if hasattr(stock, field):
                setattr(complete, field, getattr(stock, field))
        layer = layer_class(complete, index)
        _narrow_attention(layer, family.attention_output, layer_config, index)
    for path in family.feed_forward:
        reads_channels = path == family.feed_forward[-1]
        _resize(layer, path, **{"inputs" if reads_channels else "outputs": getattr(layer_config, family.channels)})
    if ATTENTION in layer_config.skip:
        layer.set_submodule(family.attention, Nothing(family.returned))
    return layer


def _renumber_caches(layers: nn.ModuleList, family: Family, config: PreTrainedConfig) -> None:
    """Gives layers with attention the first places in the cache among the layers of their type, where transformers
    reads the length of the cache. Layers without attention have no cache."""
    attentions_by_type: dict[str | None, dict[int, nn.Module]] = {}
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    for index, layer in enumerate(layers):
        if attention := dict(layer.named_modules()).get(family.attention):
            attentions_by_type.setdefault(types[index], {})[index] = attention
    for attentions in attentions_by_type.values():
        kept = [attention for attention in attentions.values() if not isinstance(attention, Nothing)]
        if len(kept) == len(attentions):
            continue
        # There are more places than attention layers: the last places are empty.
        for place, attention_module in zip(attentions, kept, strict=False):
            for module in attention_module.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = place


def _narrow_attention(layer: nn.Module, output: str, layer_config: PreTrainedConfig, index: int) -> None:
    """Gives a layer the attention of a narrower model, which has fewer heads, with projections widened to the hidden
    size."""
    path, _, output_name = output.rpartition(".")
    narrow = copy.copy(layer_config)
    narrow.hidden_size = layer_config.num_attention_heads * layer_config.head_dim
    attention = type(layer.get_submodule(path))(narrow, layer_idx=index)
    for name, child in list(attention.named_children()):
        if isinstance(child, (nn.Linear, Conv1D)):
            _resize(attention, name, **{"outputs" if name == output_name else "inputs": layer_config.hidden_size})
    heads = getattr(layer_config, "alibi_heads", None)

    def select_slopes(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        alibi = kwargs["alibi"]  # [batch * all heads of the model, 1, keys]
        return args, kwargs | {"alibi": alibi.unflatten(0, (len(args[0]), -1))[:, heads].flatten(0, 1)}

    if heads is not None:
        attention.register_forward_pre_hook(select_slopes, with_kwargs=True)
    layer.set_submodule(path, attention)


def _resize(parent: nn.Module, path: str, inputs: int | None = None, outputs: int | None = None) -> None:
    """Replaces a projection by one with another size."""
    old = parent.get_submodule(path)
    if isinstance(old, Conv1D):
        new = Conv1D(outputs or old.nf, inputs or old.nx)
    else:
        new = nn.Linear(inputs or old.in_features, outputs or old.out_features, old.bias is not None)
    parent.set_submodule(path, new.to(old.weight.dtype))


def pruned_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The config class for models of a family whose layers differ, which the stock config class refuses."""
    stock_config = CONFIG_MAPPING[model_type]
    members = {
        "__module__": __name__,
        "stock_class": stock_config,
        # With head_dim, the number of heads need not divide the hidden size.
        "validate_architecture": lambda config: None,
        # The positions of the stock model, with all its heads.
        "validate_rope": lambda config: stock_config.validate_rope(_stock_config(config)),
        # Here, reading such a size is an error.
        "allow_global_per_layer_attribute_access": property(lambda config: False, lambda config, value: None),
    }
    return strict(type(f"Pruned{stock_config.__name__}", (stock_config,), members))


def register_family(family: Family) -> type[PreTrainedModel]:
    """Makes the classes of a family whose layers differ (config, decoder and causal language model), adds them to this
    module, and returns the last. Without PyTorch, makes the config alone, which suffices to load a tokenizer."""
    config = pruned_config_class(family.model_type)
    globals()[config.__name__] = config
    if not is_torch_available():
        return PreTrainedModel
    stock_config = config.stock_class
    stock_class = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]
    name = f"Pruned{stock_class.__name__.removesuffix('ForCausalLM').removesuffix('LMHeadModel')}"
    names = {"AutoConfig": config.__name__, "AutoModel": f"{name}Model", "AutoModelForCausalLM": f"{name}ForCausalLM"}
    members = _members(f"register_family({family!r})", config, names) | {"family": family}
    decoder = type(names["AutoModel"], (_PerLayer, MODEL_MAPPING[stock_config]), members)
    causal = type(names["AutoModelForCausalLM"], (_PerLayer, stock_class), members)
    # The causal model needs no conversions: its decoder is a stock one.
    _take_conversions(decoder, MODEL_MAPPING[stock_config], family.model_type)
    globals().update({model_class.__name__: model_class for model_class in (decoder, causal)})
    return causal


def _members(registration: str, config: type[PreTrainedConfig], names: dict[str, str]) -> dict[str, object]:
    """The members of a class of models: the line of code that makes it, its config, and the names in this file."""
    auto_map = {auto_class: f"{FILE_NAME.removesuffix('.py')}.{name}" for auto_class, name in names.items()}
    return {"__module__": __name__, "registration": registration, "config_class": config, "auto_map": auto_map}


def _take_conversions(model_class: type[PreTrainedModel], stock_class: type, model_type: str) -> None:
    """Gives a custom class the conversions of weights of the stock class, which it does not get by default. Those of a
    model type stay under its name: transformers applies them once, not again to a stock model of the type inside."""
    for name, target in ((stock_class.__name__, model_class.__name__), (model_type, model_type)):
        if mapping := get_checkpoint_conversion_mapping(name):
            register_checkpoint_conversion_mapping(target, mapping, overwrite=True)
            return


def register_wrapper(family: Family, wrapper: Wrapper) -> type[PreTrainedModel]:
    """Makes the classes of a multimodal model around a decoder whose layers differ (config and model), adds them to
    this module, and returns the last. Without PyTorch, makes the config alone."""
    stock_config, text_class = CONFIG_MAPPING[wrapper.model_type], pruned_config_class(family.model_type)

    @classmethod
    def from_dict(cls, fields: dict, **options: object):
        text = fields[wrapper.text]
        stock_text = text_class.stock_class.from_dict(without_layers(text)).to_dict()
        made = super(cls, cls).from_dict(fields | {wrapper.text: stock_text}, **options)
        setattr(made[0] if isinstance(made, tuple) else made, wrapper.text, text_class.from_dict(text))
        return made

    name = f"Pruned{stock_config.__name__}"
    config = strict(type(name, (stock_config,), {"__module__": __name__, "from_dict": from_dict}))
    globals()[name] = config
    if not is_torch_available():
        return PreTrainedModel
    stock_class = MODEL_FOR_MULTIMODAL_LM_MAPPING[stock_config]
    model_name = f"Pruned{stock_class.__name__}"
    names = {"AutoConfig": name, "AutoModelForImageTextToText": model_name, "AutoModelForMultimodalLM": model_name}
    members = _members(f"register_wrapper({family!r}, {wrapper!r})", config, names)
    members |= {"family": family, "wrapper": wrapper}
    model_class = type(model_name, (_AroundPerLayer, stock_class), members)
    _take_conversions(model_class, stock_class, wrapper.model_type)
    globals()[model_name] = model_class
    return model_class
