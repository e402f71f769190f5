"""Causal language models whose layers differ in heads, feed-forward channels and experts, for mlx-lm.

A pruned checkpoint has a copy of this file, and its config names it as `model_file`, so that
`mlx_lm.load(folder, trust_remote_code=True)` works without adapruner. Only MLX and mlx-lm are imported.

The model is the one that mlx-lm has for the `model_type`. Each layer comes from such a model, built with the counts of
the layer in `per_layer_config`; MLX allocates no memory for the other layers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

# The names of attention output projections in mlx-lm.
_OUTPUTS = {"o_proj", "out_proj", "dense", "c_proj"}


class ModelArgs:
    """The whole config, and models with the counts of one of its layers."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        # transformers pads the numbers of layers with zeros: "04" if a layer after the tenth differs.
        self.layers = {int(layer): dict(fields) for layer, fields in config["per_layer_config"].items()}
        self.without_attention = {layer for layer, fields in self.layers.items() if fields.pop("skip", [])}
        self.stock_class, self.stock_args = _get_classes(config)
        self.model_with = functools.cache(self._model_with)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        return cls(config)

    def layer_counts(self, index: int) -> dict[str, Any]:
        """The counts in the config for one layer."""
        return self.layers.get(index, {})

    def stock_arguments(self, **fields: object) -> object:
        """The arguments of the stock model with other fields."""
        fields = self.config | fields
        if "num_local_experts" in fields:  # the name that transformers 5 gives it in all families
            fields["num_experts"] = fields["num_local_experts"]
        return self.stock_args.from_dict(fields)

    def layer(self, index: int) -> nn.Module:
        """A layer in its sizes, without weights."""
        counts = self.layer_counts(index)
        layer = _layers(self.model_with(json.dumps(counts)))[index]
        fields = self.config | counts
        width = fields.get("num_attention_heads", 0) * (fields.get("head_dim") or 0)
        known = {field.name for field in dataclasses.fields(self.stock_args)}
        if width and "head_dim" not in known and width != fields.get("hidden_size"):
            narrow = _layers(self.model_with(json.dumps(counts | {"hidden_size": width})))[index]
            _take_attention(layer, narrow, fields["hidden_size"])
        if index in self.without_attention:
            for name in [name for name, child in layer.children().items() if _is_attention(name, child)]:
                layer[name] = _Nothing()
        return layer

    def _model_with(self, fields: str) -> nn.Module:
        return self.stock_class(self.stock_arguments(**json.loads(fields)))


class _Nothing(nn.Module):
    """Replaces an attention: adds nothing to the hidden state."""

    def __call__(self, x: mx.array, *args: object, **kwargs: object) -> mx.array:
        for argument in (*args, *kwargs.values()):
            if hasattr(argument, "update_and_fetch"):
                # mlx-lm reads the length of the text from the cache of the first layer.
                length = mx.zeros((x.shape[0], 1, x.shape[1], 1), x.dtype)
                argument.update_and_fetch(length, length)
        return mx.zeros_like(x)


def _is_attention(name: str, child: object) -> bool:
    """True for the attention of a layer, and False for its norm, whose name may be similar."""
    modules = child.children().values() if isinstance(child, nn.Module) else ()
    return "att" in name and any(isinstance(module, nn.Linear) for module in modules)


class _PerLayer:
    """Mixin over the stock model."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args.stock_arguments(**args.layer_counts(0)))
        self.pruned_args = args
        layers = _layers(self)
        layers[:] = [args.layer(index) for index in range(len(layers))]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Converts weights as the stock model does, each layer with its number of experts; then compares shapes.

        Raises:
            ValueError: mlx-lm has no place for a tensor of this shape.
        """
        groups: dict[str, set[int]] = {}
        for index in range(len(_layers(self))):
            experts = {name: count for name, count in self.pruned_args.layer_counts(index).items() if "expert" in name}
            groups.setdefault(json.dumps(experts, sort_keys=True), set()).add(index)
        sanitized = {}
        for members in groups.values():
            first = min(members)
            stock = (
                super() if first == 0 else self.pruned_args.model_with(json.dumps(self.pruned_args.layer_counts(first)))
            )
            converted = _with_copies(weights, members) if len(groups) > 1 else weights
            converted = stock.sanitize(converted) if hasattr(stock, "sanitize") else converted
            sanitized |= {name: tensor for name, tensor in converted.items() if _layer_number(name, 0) in members}
        _check_shapes(self, sanitized)
        return sanitized


def _layers(model: nn.Module) -> list[nn.Module]:
    """The list of the layers, not a copy: some models return a copy of it as `layers`."""
    first = model.layers[0]
    lists = (value for module in model.modules() for value in module.values() if isinstance(value, list))
    return next(layers for layers in lists if layers and layers[0] is first)


def _take_attention(layer: nn.Module, narrow: nn.Module, hidden_size: int) -> None:
    """Gives a layer the attention of a narrower model, with projections widened to the hidden size: in some families,
    mlx-lm divides the hidden size by the heads for the width of a head."""
    for name, child in narrow.children().items():
        projections = child.children().items() if isinstance(child, nn.Module) and re.search("att", name) else ()
        linear = {path: projection for path, projection in projections if isinstance(projection, nn.Linear)}
        for path, projection in linear.items():
            outputs, inputs = projection.weight.shape
            size = (hidden_size, inputs) if path in _OUTPUTS else (outputs, hidden_size)
            child[path] = nn.Linear(size[1], size[0], bias="bias" in projection)
        if linear:
            layer[name] = child


def _layer_number(name: str, otherwise: int) -> int:
    """The first number in the name of a tensor."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    return int(match[0]) if match else otherwise


def _with_copies(weights: dict[str, mx.array], members: set[int]) -> dict[str, mx.array]:
    """The weights, with copies of the first member instead of every layer outside the group."""
    numbers = {_layer_number(name, -1) for name in weights}
    copied = {name: tensor for name, tensor in weights.items() if _layer_number(name, -1) in members | {-1}}
    first = {name: tensor for name, tensor in weights.items() if _layer_number(name, -1) == min(members)}
    for number in numbers - members - {-1}:
        copied |= {name.replace(f".{min(members)}.", f".{number}.", 1): tensor for name, tensor in first.items()}
    return copied


def _check_shapes(model: nn.Module, weights: dict[str, mx.array]) -> None:
    if any(name.endswith(".scales") for name in weights):
        return  # quantized by mlx-lm
    shapes = {name: parameter.shape for name, parameter in tree_flatten(model.parameters())}
    for name, tensor in weights.items():
        if shapes.get(name) != tensor.shape:
            difference = f"{name} is {tensor.shape} in the checkpoint and {shapes.get(name, 'missing')} in mlx-lm"
            raise _cannot_build(model.pruned_args, difference)


def _cannot_build(args: ModelArgs, why: object) -> ValueError:
    model_type = args.config["model_type"]
    return ValueError(f"mlx-lm cannot build this pruned {model_type}: {why}")


def _build(args: ModelArgs) -> nn.Module:
    """Builds the model; mlx-lm calls it as `Model`.

    Raises:
        ValueError: mlx-lm cannot build a model with such layers.
    """
    try:
        return type("Model", (_PerLayer, args.stock_class), {})(args)
    except Exception as error:  # anything that its classes raise over sizes
        raise _cannot_build(args, error) from error


Model = _build
