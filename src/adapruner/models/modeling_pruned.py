"""Causal language models whose layers differ in heads and feed-forward channels, or have no attention or feed-forward.

This file is complete in itself: a pruned checkpoint carries a copy of it, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where adapruner is not installed.

A checkpoint keeps its `model_type` (`llama`, …) and lists in the config key `per_layer_config`, which transformers 5
defines, what each layer has less of. Here the layers of the stock model are built again, each from its own
`config.per_layer_config[i]`. Projections named in `added_biases` (paths within a layer) have a bias that the family
does not know.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import NamedTuple

import transformers
from packaging.version import Version

# Older ones would fail at the imports below, or build layers of the wrong sizes.
if Version(transformers.__version__) < Version("5.14"):
    raise ImportError(
        "The layers of this model differ in size, which needs transformers 5.14 or newer; installed is"
        f" {transformers.__version__}. Install a newer one: pip install --upgrade 'transformers>=5.14'"
    )

from huggingface_hub.dataclasses import strict
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_torch_available

# Elsewhere (mlx-lm) a tokenizer is loaded with the config class alone.
if is_torch_available():
    import torch
    from torch import nn
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.pytorch_utils import Conv1D

    class Nothing(nn.Module):
        """In place of an attention or a feed-forward: adds nothing to the hidden state, and has no cache."""

        def __init__(self, returned: int) -> None:
            super().__init__()
            self.returned = returned

        def forward(self, *args: object, **kwargs: object) -> torch.Tensor | tuple:
            state = next(given for given in (*args, *kwargs.values()) if isinstance(given, torch.Tensor))
            nothing = torch.zeros_like(state)
            return (nothing, *[None] * (self.returned - 1)) if self.returned else nothing


FILE_NAME = "modeling_pruned.py"
# The same for mlx-lm, which the config names as `model_file`.
MLX_FILE_NAME = "mlx_pruned.py"


class Removable(NamedTuple):
    """What a layer may have none of.

    Attributes:
        fields: config fields that count what is in it; the first is 0 where a layer has none.
        module: its path in the layer.
        returned: how many things it returns, of which the first is added to the hidden state; 0 where that is all.
    """

    fields: tuple[str, ...]
    module: str
    returned: int


class Family(NamedTuple):
    """What must be known of a stock model to build its layers in other sizes; paths are relative to a layer.

    Attributes:
        layers: path of the list of layers in the causal language model.
        attention_output: in families whose attention is always as wide as the hidden size, its output projection.
        feed_forward: in families whose config has no field for their width, the feed-forward projections, the one that
            reads the channels last.
        channels: config field for the width of the feed-forward projections.
        removable: attention and feed-forward, where there is one.
    """

    model_type: str
    layers: str
    attention_output: str | None
    feed_forward: tuple[str, ...]
    channels: str
    removable: tuple[Removable, ...] = ()


class _PerLayer:
    """Mixin over a stock model, with or without language modelling head."""

    family: Family

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(_stock_config(config))
        config._attn_implementation = self.config._attn_implementation
        layers = self.base_model.get_submodule(self.family.layers.removeprefix(f"{self.base_model_prefix}."))
        # What computes positions keeps the config of the stock model: it asks for sizes that layers may differ in.
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
        for index, stock in enumerate(layers):
            layers[index] = layer = _build_layer(type(stock), self.family, config, index)
            for module in layer.modules():
                if hasattr(module, "config"):
                    module.config = _LayerConfig(config, index)
        _renumber_caches(layers, self.family, config)
        self.post_init()

    def save_pretrained(self, save_directory: str | Path, *arguments: object, **options: object) -> None:
        """As in transformers; the folder gets this file too, with a line that makes these classes again, and the file
        for mlx-lm where it lies beside this one."""
        self.config.auto_map = dict(self.auto_map)
        for_mlx = Path(__file__).with_name(MLX_FILE_NAME)
        self.config.model_file = MLX_FILE_NAME if for_mlx.is_file() else None
        super().save_pretrained(save_directory, *arguments, **options)
        if Path(save_directory).is_dir():
            if for_mlx.is_file():
                shutil.copyfile(for_mlx, Path(save_directory) / MLX_FILE_NAME)
            text, line = Path(__file__).read_text(encoding="utf-8"), f"\n\nregister_family({self.family!r})\n"
            (Path(save_directory) / FILE_NAME).write_text(text.removesuffix(line) + line, encoding="utf-8")


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


def _stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that the stock class accepts, without overrides."""
    stock = copy.copy(config)
    # Of some families, layers differ already in the dense model.
    stock.per_layer_config = getattr(config, "stock_per_layer_config", None)
    return stock


def _build_layer(layer_class: type[nn.Module], family: Family, config: PreTrainedConfig, index: int) -> nn.Module:
    own, stock = config.per_layer_config[index], _stock_config(config).per_layer_config[index]
    gone = [part for part in family.removable if getattr(own, part.fields[0], None) == 0]
    for field in (field for part in gone for field in part.fields):
        # Stock classes cannot build what there is none of: it is built as in the stock model, and replaced.
        if hasattr(stock, field):
            setattr(own, field, getattr(stock, field))
    if family.attention_output is None:
        layer = layer_class(own, index)
    else:
        layer = layer_class(_with_all_heads(own, config), index)
        _narrow_attention(layer, family.attention_output, own, index)
    for path in family.feed_forward:
        reads_channels = path == family.feed_forward[-1]
        _resize(layer, path, **{"inputs" if reads_channels else "outputs": getattr(own, family.channels)})
    modules = dict(layer.named_modules())
    for path in getattr(config, "added_biases", ()):
        # Not all layers of a family need be alike.
        if path in modules:
            _resize(layer, path, bias=True)
    for part in gone:
        layer.set_submodule(part.module, Nothing(part.returned))
    return layer


def _renumber_caches(layers: nn.ModuleList, family: Family, config: PreTrainedConfig) -> None:
    """Layers without attention have no cache. The others take the first places among the layers of their type, since
    transformers asks those how much is in the cache."""
    attention = next((part for part in family.removable if part.fields[0] == "num_attention_heads"), None)
    with_place: dict[str | None, list[int]] = {}
    for index, layer in enumerate(layers):
        if attention and any(name == attention.module for name, _ in layer.named_modules()):
            types = getattr(config, "layer_types", None)
            with_place.setdefault(types[index] if types else None, []).append(index)
    for places in with_place.values():
        modules = [layers[index].get_submodule(attention.module) for index in places]
        kept = [module for module in modules if not isinstance(module, Nothing)]
        if len(kept) == len(modules):
            continue
        # More places than attentions: the last places stay empty.
        for place, module in zip(places, kept, strict=False):
            for part in module.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = place


def _with_all_heads(own: PreTrainedConfig, config: PreTrainedConfig) -> PreTrainedConfig:
    stock, whole = _stock_config(config), copy.copy(own)
    for field in ("num_attention_heads", "num_key_value_heads"):
        if hasattr(stock, field):
            setattr(whole, field, getattr(stock, field))
    return whole


def _narrow_attention(layer: nn.Module, output: str, own: PreTrainedConfig, index: int) -> None:
    """An attention with less heads is that of a narrower model, with projections that reach to the hidden size."""
    path, _, output_name = output.rpartition(".")
    narrow = copy.copy(own)
    narrow.hidden_size = own.num_attention_heads * own.head_dim
    attention = type(layer.get_submodule(path))(narrow, layer_idx=index)
    for name, child in list(attention.named_children()):
        if isinstance(child, (nn.Linear, Conv1D)):
            _resize(attention, name, **{"outputs" if name == output_name else "inputs": own.hidden_size})
    if getattr(own, "alibi_heads", None) is not None:
        attention.register_forward_pre_hook(_alibi_of(own.alibi_heads), with_kwargs=True)
    layer.set_submodule(path, attention)


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
    self.stock_class.validate_rope(_stock_config(self))


def pruned_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The config of the models of a family whose layers differ, which a stock config class refuses."""
    stock_config = CONFIG_MAPPING[model_type]
    of_config = {
        "__module__": __name__,
        "stock_class": stock_config,
        "validate_architecture": _accept_any_heads,
        "validate_rope": _validate_stock_rope,
    }
    return strict(type(f"Pruned{stock_config.__name__}", (stock_config,), of_config))


def register_family(family: Family) -> type[PreTrainedModel]:
    """Makes the classes of a family whose layers differ (config, decoder and causal language model) and adds them to
    this module; returns the last. Without PyTorch, the config alone, which is what loading a tokenizer needs."""
    config = pruned_config_class(family.model_type)
    globals()[config.__name__] = config
    if not is_torch_available():
        return PreTrainedModel
    stock_config = config.stock_class
    stock_class = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]
    name = f"Pruned{stock_class.__name__.removesuffix('ForCausalLM').removesuffix('LMHeadModel')}"
    names = {"AutoConfig": config.__name__, "AutoModel": f"{name}Model", "AutoModelForCausalLM": f"{name}ForCausalLM"}
    auto_map = {of: f"{FILE_NAME.removesuffix('.py')}.{own}" for of, own in names.items()}
    own = {"__module__": __name__, "family": family, "auto_map": auto_map, "config_class": config}
    decoder = type(names["AutoModel"], (_PerLayer, MODEL_MAPPING[stock_config]), own)
    causal = type(names["AutoModelForCausalLM"], (_PerLayer, stock_class), own)
    # A custom class does not get the conversions of its family by default. The causal model needs none: its decoder is
    # a stock one.
    stock_names = (MODEL_MAPPING[stock_config].__name__, family.model_type)
    if mapping := next(filter(None, map(get_checkpoint_conversion_mapping, stock_names)), None):
        register_checkpoint_conversion_mapping(decoder.__name__, mapping, overwrite=True)
    globals().update({made.__name__: made for made in (decoder, causal)})
    return causal
