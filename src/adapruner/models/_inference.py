"""The architecture of a family that nobody has described, read off a tiny random model of its own class.

What a row-wise projection reads is computed by those rows of other parameters to which its inputs have a gradient.
Inputs that share such rows belong to one group: a channel, or a key/value head with its query heads. Which config
fields count them is found by changing the fields and comparing shapes. No names of parameters are looked for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapruner.errors import AdaPrunerError, reason
from adapruner.models._architecture import Architecture, ConfigFields, ExpertNames, ProjectionNames, RowKind
from adapruner.models._tiny import parameters_of, tiny_config

_HEADS, _KEY_VALUE_HEADS = "num_attention_heads", "num_key_value_heads"
_TOKENS = 48
_MOST_PARAMETERS = 50_000_000
# Of a row-wise projection with more inputs than this, no groups are looked for: it belongs to no tiny model.
_MOST_INPUTS = 1024


class InferenceError(AdaPrunerError):
    """Nothing that could be removed was found in a model."""


class _Transparent(TorchFunctionMode):
    """While it lasts, statistics of norms are constants and rectifiers are smooth, so that a number has a gradient to
    exactly what it is computed from."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (functional.layer_norm, functional.rms_norm):
            return _norm(function is functional.layer_norm, *args, **kwargs)
        if function in (functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_):
            return functional.silu(args[0])
        result = function(*args, **kwargs)
        return result.detach() if getattr(function, "__name__", "") in ("rsqrt", "mean", "var") else result


def _norm(
    centred: bool, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: Any = None
) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    mean = x.mean(axes, keepdim=True) if centred else torch.zeros(())
    scaled = (x - mean) * ((x - mean).square().mean(axes, keepdim=True) + (eps or 1e-6)).rsqrt()
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


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
        seen = [_Layer(model, path, layers, index) for index in _distinct(layers)]
    except InferenceError:
        raise
    except Exception as error:  # whatever a model class raises over sizes that it was not made for
        raise InferenceError(
            f"a small {config.model_type} cannot be run to find out how it is built: {reason(error)}"
        ) from error
    return _described(model, _Counting(tiny, path), path, seen)


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a config in which every weight matters; float32, always the same."""
    config = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1)
            parameter.requires_grad_()
        # So large that the epsilon of norms is nothing beside it.
        cast(nn.Embedding, model.get_input_embeddings()).weight.data *= 10
    return model


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


@dataclass(frozen=True)
class _Part:
    """The rows of one parameter, along its outputs, that inputs of a writer depend on.

    Attributes:
        rows: [inputs, rows] bool: which input depends on which.
        groups, query_heads: those of every row; None where there is not one.
    """

    parameter: str
    rows: Tensor
    groups: list[int | None]
    query_heads: list[int | None]

    def passes(self, count: int) -> list[slice] | None:
        """Where all groups come by in order, each as wide as the others; None where they come by otherwise."""
        runs = [(group, len(list(rows))) for group, rows in groupby(self.groups)]
        if [group for group, _ in runs] != list(range(count)) * (len(runs) // count):
            return None
        found, start = [], 0
        for width, own in groupby(runs, key=lambda run: run[1]):
            for _ in range(len(list(own)) // count):
                found.append(slice(start, start + width * count))
                start += width * count
        return found if start == len(self.groups) else None

    def kind_of_heads(self, one: slice, count: int) -> RowKind:
        """What the rows of one pass compute: queries belong to one query head, and each input has its own value."""
        alone = {head is not None for head in self.query_heads[one]}
        if len(alone) > 1:
            return "query-key-value"
        is_query = alone.pop()
        if is_query and self.query_heads[one] != self.groups[one]:
            return "query"
        has_own_row = one.stop - one.start > count and int(self.rows[:, one].sum(1).max()) == 1
        return "value" if has_own_row else "query" if is_query else "key"


@dataclass(frozen=True)
class _Writer:
    """A projection whose output is added to the hidden state.

    Attributes:
        inputs: how many numbers it reads per token.
        plain: whether its output is added as it is.
    """

    path: str
    inputs: int
    plain: bool


class _Layer:
    """One decoder layer of the tiny model, and what its projections read."""

    def __init__(self, model: PreTrainedModel, path: str, layers: list[nn.Module], index: int) -> None:
        self.index, self.path = index, f"{path}.{index}"
        self._model, self._layer = model, layers[index]
        self.parameters = dict(self._layer.named_parameters())
        hidden = model.config.hidden_size
        self._projections = {
            name: module
            for name, module in self._layer.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and _outputs(module) == hidden
        }
        self._read: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(lambda _, args, name=name: self._read.__setitem__(name, args[0]))
            for name, module in self._projections.items()
        ]
        self._run(hooks)
        self.writers = {writer.path: writer for writer in self._find_writers()}

    def linears(self) -> set[str]:
        """Paths of the plain projections."""
        return {name for name, module in self._layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}

    def weight(self, writer: _Writer) -> str:
        """The name of the weight of a writer in the model."""
        return f"{self.path}.{writer.path}.weight"

    def input_axis(self, writer: _Writer) -> int:
        """The axis of its weight, as it is stored, along which its inputs lie."""
        return 0 if isinstance(self._projections[writer.path], Conv1D) else 1

    def size(self, inputs: Iterable[str], writer: _Writer) -> int:
        """How many numbers the parameters hold, with those of a writer."""
        return sum(self.parameters[name].numel() for name in (*inputs, f"{writer.path}.weight"))

    def groups(self, writer: _Writer, heads: int) -> tuple[int, list[_Part]]:
        """How many groups the inputs of a writer fall into, and what else belongs to them.

        Args:
            heads: query heads, whose inputs lie one behind the other; 0 where there are none.
        """
        touched = self._touched(writer)
        count, owner = _components(writer.inputs, touched.values())
        query_head = torch.arange(writer.inputs) * heads // writer.inputs if heads > 1 else owner
        return count, [
            _Part(
                name,
                rows,
                [_only(owner[column]) for column in rows.T],
                [_only(query_head[column]) for column in rows.T],
            )
            for name, rows in touched.items()
        ]

    def _touched(self, writer: _Writer) -> dict[str, Tensor]:
        """For each parameter of which no input of a writer depends on every row, [inputs, rows] bool: on which ones."""
        read = self._read[writer.path]
        mix = torch.randn(read.shape[:-1], generator=torch.Generator().manual_seed(2))
        rows: dict[str, list[Tensor]] = {}
        for one in range(writer.inputs):
            gradients = torch.autograd.grad(
                (read[..., one] * mix).sum(), list(self.parameters.values()), retain_graph=True, allow_unused=True
            )
            for (name, parameter), gradient in zip(self.parameters.items(), gradients, strict=True):
                axis = self._axis(name)
                other = [each for each in range(parameter.dim()) if each != axis]
                is_touched = torch.zeros_like(parameter, dtype=torch.bool) if gradient is None else gradient != 0
                rows.setdefault(name, []).append(is_touched.amax(other) if other else is_touched)
        touched = {name: torch.stack(each) for name, each in rows.items()}
        return {name: each for name, each in touched.items() if each.any(1).all() and not each.all(1).any()}

    def _axis(self, name: str) -> int:
        """The axis of a parameter along which its outputs lie."""
        owner = self._layer.get_submodule(name.rpartition(".")[0])
        return int(isinstance(owner, Conv1D) and self.parameters[name].dim() > 1)

    def _find_writers(self) -> Iterator[_Writer]:
        """With all other candidates silent, the output of the layer is what a writer puts out, and what came in."""
        for name, module in self._projections.items():
            read = self._read.get(name)
            if read is None or not read.requires_grad or read.shape[-1] > _MOST_INPUTS:
                continue
            noted: dict[str, Tensor] = {}
            # Experts are parameters of three axes, not projections.
            experts = [
                each
                for each in self._layer.modules()
                if any(parameter.dim() == 3 for parameter in each.parameters(recurse=False))
            ]
            others = [other for each, other in self._projections.items() if each != name]
            silent = [other.register_forward_hook(lambda *about: _silenced(about[2])) for other in (*others, *experts)]
            hooks = [
                *silent,
                module.register_forward_hook(lambda *about, noted=noted: noted.update(written=about[2])),
                self._layer.register_forward_pre_hook(
                    lambda _, args, given, noted=noted: noted.update(before=(args or list(given.values()))[0]),
                    with_kwargs=True,
                ),
                self._layer.register_forward_hook(lambda *about, noted=noted: noted.update(after=_first(about[2]))),
            ]
            self._run(hooks)
            written, after = noted["written"], noted["after"].flatten(0, -2)
            if not written.requires_grad or not after.requires_grad:
                continue
            (gradient,) = torch.autograd.grad(after[:, 5].sum(), written, allow_unused=True)
            if gradient is not None and (gradient.flatten(0, -2) != 0).any(0).nonzero().flatten().tolist() == [5]:
                plain = torch.allclose(after, (noted["before"] + written.view_as(noted["before"])).flatten(0, -2))
                yield _Writer(name, self._read[name].shape[-1], plain)

    def _run(self, hooks: Iterable[Any]) -> None:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(3, self._model.config.vocab_size, (2, _TOKENS // 2), generator=generator)
        try:
            with _Transparent(), torch.enable_grad():
                self._model(tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()


def _silenced(output: Any) -> Any:
    return torch.zeros_like(output) if isinstance(output, Tensor) else tuple(map(_silenced, output))


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple | list) else output
    return tensor


def _outputs(module: Any) -> int:
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)


def _components(inputs: int, touched: Iterable[Tensor]) -> tuple[int, Tensor]:
    """How many groups there are, and the group of each input: inputs that touch a row together are of one group."""
    parent = list(range(inputs))

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    for rows in touched:
        for column in rows.T:
            together = column.nonzero().flatten().tolist()
            for one in together[1:]:
                parent[root(one)] = root(together[0])
    roots = [root(one) for one in range(inputs)]
    numbers = {one: number for number, one in enumerate(dict.fromkeys(roots))}
    return len(numbers), torch.tensor([numbers[one] for one in roots])


def _only(values: Tensor) -> int | None:
    """The one value that all have; None where they have several, or there are none."""
    distinct = values.unique()
    return int(distinct) if len(distinct) == 1 else None


# What a config calls the experts that a token is sent to, and the groups of experts that are chosen first.
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
_EXPERT_GROUPS, _CHOSEN_GROUPS = ("n_group", "num_expert_group"), ("topk_group",)
# By how much a width is changed to see what moves.
_STEP = 16
_Shapes = dict[str, tuple[int, ...]]


class _Counting:
    """Which config fields count what: they are changed, one at a time, and the shapes compared."""

    def __init__(self, config: PreTrainedConfig, layers: str) -> None:
        self.config, self._layers = config, layers
        self._now = self.shapes({}) or {}
        hidden = _input_embedding(config)
        fields = {name: value for name, value in config.to_dict().items() if _is_count(value)}
        self._wider: dict[str, _Shapes] = {}
        self._doubled: dict[str, _Shapes] = {}
        for name, value in fields.items():
            for shapes, changed in ((self._wider, (value or 0) + _STEP), (self._doubled, 2 * (value or 0))):
                found = self.shapes({name: changed}) if changed else None
                if found and found != self._now and _input_embedding(config, {name: changed}) == hidden:
                    shapes[name] = found

    def shapes(self, changes: Mapping[str, Any]) -> _Shapes | None:
        """Of all tensors in the layers, with other fields; None where such a model cannot be built."""
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(_changed(self.config, changes))
        except Exception:  # whatever a config or model class raises
            return None
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(f"{self._layers}.")}

    def width_field(self, parameter: str, axis: int) -> str | None:
        """The field that an axis of a parameter is as wide as."""
        size = self._now[parameter][axis]
        for name, shapes in self._wider.items():
            value = getattr(self.config, name)
            # As wide as it says, and not as wide as its class makes of that.
            if value in (None, size) and parameter in shapes and shapes[parameter][axis] == (value or 0) + _STEP:
                return name
        return None

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


def _changed(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _input_embedding(config: PreTrainedConfig, changes: Mapping[str, Any] | None = None) -> tuple[int, ...] | None:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(_changed(config, changes or {}))
        return tuple(model.get_input_embeddings().weight.shape)
    except Exception:  # as above
        return None


@dataclass(frozen=True)
class _Found:
    """A kind of groups: the projections, the config fields by their names in `Architecture`, and how much they hold."""

    names: ProjectionNames
    fields: dict[str, Any]
    parameters: int
    plain: bool


def _described(model: PreTrainedModel, counting: _Counting, path: str, layers: Sequence[_Layer]) -> Architecture:
    attention: dict[str, list[_Found]] = {}
    feed_forward: dict[str, list[_Found]] = {}
    with_experts = [layer for layer in layers if counting.expert_field(layer.path)]
    for layer in layers:
        for writer in layer.writers.values():
            if heads := _heads(layer, writer, counting):
                attention.setdefault(writer.path, []).append(heads)
            # Shared experts stay: every token needs them.
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
    names = ProjectionNames(inputs=inputs, output=several[0].names.output)
    return _Found(names, several[-1].fields, 0, all(found.plain for found in several))


def _heads(layer: _Layer, writer: _Writer, counting: _Counting) -> _Found | None:
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
    return _Found(_names(inputs, writer), fields, layer.size(inputs, writer), writer.plain)


def _channels(layer: _Layer, writer: _Writer, counting: _Counting) -> _Found | None:
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
    return _Found(_names(inputs, writer), fields, layer.size(inputs, writer), writer.plain)


def _names(inputs: Mapping[str, tuple[RowKind, ...]], writer: _Writer) -> ProjectionNames:
    """Weights and biases by their module, other parameters by their own name."""
    by_module = {name.removesuffix(".weight"): kinds for name, kinds in inputs.items()}
    own = {
        name: kinds for name, kinds in by_module.items() if name.removesuffix(".bias") not in by_module.keys() - {name}
    }
    return ProjectionNames(inputs=own, output=writer.path)


def _experts(counting: _Counting, layers: Sequence[_Layer]) -> ExpertNames | None:
    tensors: dict[str, int] = {}
    field = None
    for layer in layers:
        if found := counting.expert_field(layer.path):
            field, axes = found
            tensors |= axes
    if field is None:
        return None
    top_k = next((name for name in _TOP_K if getattr(counting.config, name, None)), None)
    groups = next((name for name in _EXPERT_GROUPS if getattr(counting.config, name, None)), None)
    chosen = next((name for name in _CHOSEN_GROUPS if getattr(counting.config, name, None)), None)
    return ExpertNames(tensors=tensors, count=field, top_k=top_k, groups=groups, chosen_groups=chosen)


def _has_learned_positions(model: PreTrainedModel) -> bool:
    longest, words = getattr(model.config, "max_position_embeddings", None), model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words)
    return longest is not None and any(longest <= table.num_embeddings <= longest + 2 for table in tables)
