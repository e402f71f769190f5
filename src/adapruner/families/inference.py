"""The architecture of a family that nobody has described, read off a tiny random model of its own class.

What a row-wise projection reads is computed by those rows of other parameters to which its inputs have a gradient.
Inputs that share such rows belong to one group: a channel, or a key/value head with its query heads. Which config
fields count them is found by changing the fields and comparing shapes. No names of parameters are looked for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from adapruner.errors import AdaPrunerError, reason
from adapruner.families.tiny import CHOSEN_GROUPS, EXPERT_GROUPS, TOP_K, parameters_of, random_model, tiny_config
from adapruner.families.tracing import Layer, Writer
from adapruner.models._architecture import (
    Architecture,
    ConfigFields,
    ExpertChannels,
    ExpertNames,
    ProjectionNames,
    RowKind,
)

_HEADS, _KEY_VALUE_HEADS = "num_attention_heads", "num_key_value_heads"
_MOST_PARAMETERS = 50_000_000
# By how much a width is changed to see what moves.
_STEP = 16
_Shapes = dict[str, tuple[int, ...]]


class InferenceError(AdaPrunerError):
    """Nothing that could be removed was found in a model."""


def infer_architecture(config: PreTrainedConfig) -> Architecture:
    """What can be removed from the models of a family, from one config of it.

    Args:
        config: of a stock model.

    Raises:
        InferenceError: transformers cannot build or run such a model in a small size, or nothing can be removed.
    """
    if not hasattr(config, "num_hidden_layers") or config.get_text_config() is not config:
        raise InferenceError(
            f"a {config.model_type} has other models beside a text model: save its text model alone, and prune that"
        )
    try:
        tiny = tiny_config(config)
        if (size := parameters_of(tiny)) > _MOST_PARAMETERS:
            raise InferenceError(f"a {config.model_type} cannot be made small: {size:,} parameters are left")
        # Of some families, layers differ already; what holds for most of them is read then.
        tiny.allow_global_per_layer_attribute_access = True
        model = random_model(tiny)
        path, layers = _layer_list(model)
        seen = [Layer(model, path, layers, index) for index in _distinct(layers)]
    except InferenceError:
        raise
    except Exception as error:  # whatever a model class raises over sizes that it was not made for
        raise InferenceError(
            f"a small {config.model_type} cannot be run to find out how it is built: {reason(error)}"
        ) from error
    return _described(model, _Counting(tiny, path), path, seen)


def _layer_list(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """The list of decoder layers, by its path: that of as many modules as there are layers which holds the most."""
    count = model.config.num_hidden_layers
    lists = {
        path: list(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if not lists:
        raise InferenceError(f"a {model.config.model_type} has no list of {count} decoder layers")
    path = max(lists, key=lambda each: sum(part.numel() for layer in lists[each] for part in layer.parameters()))
    return path, lists[path]


def _distinct(layers: Sequence[nn.Module]) -> list[int]:
    """One layer of every make; the last of each, because first layers may be special."""
    makes = {
        tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()): index
        for index, layer in enumerate(layers)
    }
    return sorted(makes.values())


class _Counting:
    """Which config fields count what: they are changed, one at a time, and the shapes compared."""

    def __init__(self, config: PreTrainedConfig, layers: str) -> None:
        self.config, self._layers = config, layers
        self._now, embedding = self._built({}) or ({}, None)
        self._wider: dict[str, _Shapes] = {}
        self._doubled: dict[str, _Shapes] = {}
        for name, value in config.to_dict().items():
            if not _is_count(value):
                continue
            for shapes, changed in ((self._wider, (value or 0) + _STEP), (self._doubled, 2 * (value or 0))):
                built = self._built({name: changed}) if changed else None
                # What changes the embedding is the hidden size or the vocabulary.
                if built and built[0] != self._now and built[1] == embedding:
                    shapes[name] = built[0]

    def shapes(self, changes: Mapping[str, Any]) -> _Shapes | None:
        """Of all tensors in the layers, with other fields; None where such a model cannot be built."""
        built = self._built(changes)
        return built and built[0]

    def _built(self, changes: Mapping[str, Any]) -> tuple[_Shapes, tuple[int, ...]] | None:
        """The shapes of the tensors in the layers, and of the input embedding."""
        config = copy.deepcopy(self.config)
        try:
            for name, value in changes.items():
                setattr(config, name, value)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            embedding = tuple(model.get_input_embeddings().weight.shape)
        except Exception:  # whatever a config or model class raises over a field that it was not made for
            return None
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        prefix = f"{self._layers}."
        return {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(prefix)}, embedding

    def width_field(self, parameter: str, axis: int) -> str | None:
        """The field that an axis of a parameter is as wide as."""
        size = self._now[parameter][axis]
        for name, shapes in self._wider.items():
            value = getattr(self.config, name)
            # As wide as it says, and not as wide as its class makes of that.
            if value in (None, size) and parameter in shapes and shapes[parameter][axis] == (value or 0) + _STEP:
                return name
        return None

    def size(self, parameter: str, axis: int) -> int:
        """How long an axis of a parameter is."""
        return self._now[parameter][axis]

    def moved(self, layer: str, field: str) -> set[str]:
        """The tensors of a layer that become wider with a field."""
        shapes = self._wider[field]
        return {name for name, before in self._now.items() if name.startswith(f"{layer}.") and shapes[name] != before}

    def expert_field(self, layer: str) -> tuple[str, dict[str, int]] | None:
        """The field that counts experts, and the axis of every tensor of a layer along which they lie."""
        for name, shapes in self._doubled.items():
            count, axes = getattr(self.config, name), dict[str, int]()
            for tensor, before in self._now.items():
                after = shapes.get(tensor)
                if not tensor.startswith(f"{layer}.") or after == before:
                    continue
                moved = [axis for axis, size in enumerate(before) if after is None or after[axis] != size]
                if after is None or len(moved) != 1 or (before[moved[0]], after[moved[0]]) != (count, 2 * count):
                    break
                axes[tensor.removeprefix(f"{layer}.")] = moved[0]
            else:
                if any(len(self._now[f"{layer}.{tensor}"]) == 3 and axis == 0 for tensor, axis in axes.items()):
                    return name, axes
        return None


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


@dataclass(frozen=True)
class _Found:
    """A kind of groups: the projections, the config fields by their names in `Architecture`, and how much they hold."""

    names: ProjectionNames
    fields: dict[str, Any]
    parameters: int
    plain: bool


def _described(model: PreTrainedModel, counting: _Counting, path: str, layers: Sequence[Layer]) -> Architecture:
    attention: dict[str, list[_Found]] = {}
    feed_forward: dict[str, list[_Found]] = {}
    with_experts = [layer for layer in layers if counting.expert_field(layer.path)]
    for layer in layers:
        for writer in layer.writers.values():
            if heads := _heads(layer, writer, counting):
                attention.setdefault(writer.path, []).append(heads)
            # Shared experts are kept whole: every token needs them.
            elif layer not in with_experts and (channels := _channels(layer, writer, counting)):
                feed_forward.setdefault(writer.path, []).append(channels)
    kinds = {"attention": _largest(attention), "feed_forward": _largest(feed_forward)}
    found: dict[str, _Found] = {kind: each for kind, each in kinds.items() if each is not None}
    experts = _experts(counting, with_experts)
    if not found and experts is None:
        raise InferenceError(
            f"in a {model.config.model_type}, no heads, channels or experts were found that can be removed"
        )
    fields: dict[str, Any] = {}
    for each in found.values():
        fields |= each.fields
    counts = {name: fields.pop(name) for name in list(fields) if name in ConfigFields.model_fields}
    return Architecture(
        model_type=model.config.model_type,
        layers=path,
        config_fields=ConfigFields(**counts),
        plain_residual=all(each.plain for each in found.values()),
        learned_positions=_has_learned_positions(model),
        experts=experts,
        **(fields | {kind: each.names for kind, each in found.items()}),
    )


def _largest(by_output: Mapping[str, list[_Found]]) -> _Found | None:
    """Of several writers of one kind, the one that holds most in all layers; where layers differ in what computes its
    inputs, all of that."""
    if not by_output:
        return None
    several = max(by_output.values(), key=lambda each: sum(found.parameters for found in each))
    inputs: dict[str, tuple[RowKind, ...]] = {}
    for found in several:
        inputs |= found.names.inputs
    names = several[0].names.model_copy(update={"inputs": inputs})
    return _Found(names, several[-1].fields, 0, all(found.plain for found in several))


def _heads(layer: Layer, writer: Writer, counting: _Counting) -> _Found | None:
    """The heads whose outputs a writer reads."""
    config = counting.config
    heads, key_value_heads = getattr(config, _HEADS, None), getattr(config, _KEY_VALUE_HEADS, None)
    if not heads or heads < 2 or writer.inputs % heads:
        return None
    fewer = {_HEADS: heads // 2, "head_dim": getattr(config, "head_dim", None) or writer.inputs // heads}
    if key_value_heads:
        fewer[_KEY_VALUE_HEADS] = max(1, key_value_heads // 2)
    shapes, weight = counting.shapes(fewer), layer.weight(writer)
    is_narrower = shapes is not None and 2 * shapes[weight][layer.input_axis(writer)] == writer.inputs
    if not is_narrower and writer.inputs != config.hidden_size:
        return None
    count, parts = layer.groups(writer, heads)
    if count < 2 or count not in (heads, key_value_heads):
        return None
    inputs: dict[str, tuple[RowKind, ...]] = {}
    for part in parts:
        passes = part.passes(count)
        if passes is None:
            return None
        inputs[part.parameter] = tuple(part.kind_of_heads(one, count) for one in passes)
    fields = {"heads": _HEADS, "fixed_attention_width": not is_narrower}
    if count == key_value_heads:
        fields["key_value_heads"] = _KEY_VALUE_HEADS
    return _Found(_names(layer, inputs, writer), fields, layer.size(inputs, writer), writer.plain)


def _channels(layer: Layer, writer: Writer, counting: _Counting) -> _Found | None:
    """The feed-forward channels that a writer reads."""
    config = counting.config
    field = counting.width_field(layer.weight(writer), layer.input_axis(writer))
    if field is None and writer.inputs <= config.hidden_size:
        return None
    count, parts = layer.groups(writer, 0)
    if count != writer.inputs:
        return None
    inputs: dict[str, tuple[RowKind, ...]] = {}
    for part in parts:
        passes = part.passes(count)
        if passes is None or (field is None and part.parameter.rpartition(".")[0] not in layer.linears()):
            return None
        channels: list[RowKind] = ["channels"]
        inputs[part.parameter] = tuple(channels * len(passes))
    fields: dict[str, Any] = {"channels": field or "intermediate_size", "fixed_channels": field is None}
    if field is None or getattr(config, field) is None:
        fields["default_channels"] = writer.inputs // config.hidden_size
    return _Found(_names(layer, inputs, writer), fields, layer.size(inputs, writer), writer.plain)


def _names(layer: Layer, inputs: Mapping[str, tuple[RowKind, ...]], writer: Writer) -> ProjectionNames:
    """Weights and biases by their module, other parameters by their own name."""
    by_module = {name.removesuffix(".weight"): kinds for name, kinds in inputs.items()}
    own = {
        name: kinds for name, kinds in by_module.items() if name.removesuffix(".bias") not in by_module.keys() - {name}
    }
    names = ProjectionNames(inputs=own, output=writer.path, normalized=writer.normalized)
    return names.model_copy(update={"returned": layer.returned(names.module)})


def _experts(counting: _Counting, layers: Sequence[Layer]) -> ExpertNames | None:
    tensors: dict[str, int] = {}
    field, channels = None, None
    for layer in layers:
        if found := counting.expert_field(layer.path):
            field, axes = found
            tensors |= axes
            channels = _expert_channels(counting, layer, [path for path, axis in axes.items() if axis == 0])
    if field is None:
        return None

    def named(names: Sequence[str]) -> str | None:
        return next((name for name in names if getattr(counting.config, name, None)), None)

    return ExpertNames(
        tensors=tensors,
        count=field,
        top_k=named(TOP_K),
        groups=named(EXPERT_GROUPS),
        chosen_groups=named(CHOSEN_GROUPS),
        channels=channels,
    )


def _expert_channels(counting: _Counting, layer: Layer, stacks: Sequence[str]) -> ExpertChannels | None:
    """What is inside of the experts of a layer, where a config field counts that and nothing else."""
    writer = layer.expert_writer([path for path in stacks if path in layer.parameters])
    if writer is None:
        return None
    count = counting.size(f"{layer.path}.{writer.parameter}", writer.axis)
    field = counting.width_field(f"{layer.path}.{writer.parameter}", writer.axis)
    passes = {part.parameter: part.passes(count) for part in writer.parts}
    own = {f"{layer.path}.{path}" for path in (writer.parameter, *passes)}
    if field is None or None in passes.values() or not passes or counting.moved(layer.path, field) != own:
        return None
    inputs = {path: tuple((one.stop - one.start) // count for one in each or ()) for path, each in passes.items()}
    axes = {**writer.axes, writer.parameter: writer.axis}
    return ExpertChannels(inputs=inputs, output=writer.parameter, axes=axes, count=field)


def _has_learned_positions(model: PreTrainedModel) -> bool:
    longest, words = getattr(model.config, "max_position_embeddings", None), model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words)
    return longest is not None and any(longest <= table.num_embeddings <= longest + 2 for table in tables)
