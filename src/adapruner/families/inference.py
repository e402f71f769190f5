"""The architecture of a family that no file describes, read off a tiny random model of its class.

The inputs of a row-wise projection have gradients to the rows of other parameters that compute them. Inputs that share
such rows belong to one group: a channel, or a key/value head with its query heads. The config fields that count groups
are found by changing fields and comparing shapes. Parameter names are not used."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from adapruner.base.errors import AdaPrunerError, reason
from adapruner.families.tracing import Layer, Writer
from adapruner.model.architecture import (
    Architecture,
    ConfigFields,
    ExpertChannels,
    ExpertNames,
    ProjectionNames,
    RowKind,
    fields_by_layer,
)

# Configs below these sizes are used unchanged.
_COPIED_PARAMETERS, _MOST_LAYERS = 10_000_000, 8
_LAYERS, _TINY_HEADS, _TINY_KEY_VALUE_HEADS, _WIDTH, _EXPERTS = 4, 4, 2, 16, 4
# Config fields for the experts per token, the groups of experts, and the number of groups that are chosen first.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
EXPERT_GROUPS, CHOSEN_GROUPS = ("n_group", "num_expert_group"), ("topk_group",)
# By config fields. Heads fill the hidden size, as some families require.
_SIZES: dict[str, int] = {
    name: size
    for names, size in {
        "hidden_size n_embd d_model lru_width word_embed_proj_dim": _TINY_HEADS * _WIDTH,
        "num_hidden_layers n_layer n_layers num_layers": _LAYERS,
        "num_attention_heads n_head n_heads": _TINY_HEADS,
        "num_key_value_heads num_global_key_value_heads swa_num_key_value_heads num_kv_heads": _TINY_KEY_VALUE_HEADS,
        "head_dim kv_channels v_head_dim swa_head_dim rotary_dim qk_rope_head_dim qk_nope_head_dim": _WIDTH,
        "global_head_dim": 2 * _WIDTH,
        "intermediate_size ffn_dim n_inner ffn_hidden_size": 96,
        "moe_intermediate_size expert_ffn_hidden_size": 48,
        "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size": 32,
        "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts": _EXPERTS,
        " ".join(TOP_K): 2,
        " ".join((*EXPERT_GROUPS, *CHOSEN_GROUPS)): 1,
        "kv_lora_rank q_lora_rank": 24,
        "mamba_n_heads mamba_num_heads linear_num_value_heads": 8,
        "mamba_d_head mamba_head_dim linear_value_head_dim linear_key_head_dim": 16,
        "mamba_d_state ssm_state_size mamba_dt_rank mamba_chunk_size chunk_size": 16,
        "linear_num_key_heads mamba_n_groups mamba_ngroups n_groups": 4,
        "mamba_d_ssm max_position_embeddings n_positions": 128,
        "attn_layer_period expand mamba_expand num_kv_shared_layers": 2,
        "attn_layer_offset first_k_dense_replace moe_layer_start_index": 1,
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size": 256,
        "hidden_size_per_layer_input": 16,
        "sliding_window": 8,
    }.items()
    for name in names.split()
}
_LEFT_OUT = ("transformers_version", "model_type", "architectures", "dtype", "allow_global_per_layer_attribute_access")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same class as that of a stock model, with the same options, for a model of a few hundred thousand
    parameters; the config of a small model is copied."""
    config = copy.deepcopy(config)
    if config.num_hidden_layers <= _MOST_LAYERS and parameters_of(config) <= _COPIED_PARAMETERS:
        return config
    config.allow_global_per_layer_attribute_access = True
    heads, key_value_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    fields = {
        name: _shrunk(name, value, config.num_hidden_layers)
        for name, value in config.to_dict().items()
        if name not in _LEFT_OUT
    }
    types: list[object] = list(getattr(config, "layer_types", None) or [None] * config.num_hidden_layers)
    if per_layer := fields.get("per_layer_config"):
        fields["per_layer_config"] = _shrunk_layers(per_layer, types, _sampled(types))
    fields |= {name: number for number, name in enumerate(_TOKENS) if fields.get(name) is not None}
    if heads == key_value_heads and "num_key_value_heads" in fields:
        fields |= dict.fromkeys({"num_attention_heads", "num_key_value_heads"} & fields.keys(), _TINY_HEADS)
    # The heads of a state-space mixer times their width must equal its width.
    if fields.get("mamba_n_heads") and not fields.get("mamba_d_ssm"):
        fields["mamba_d_head"] = fields["mamba_expand"] * fields["hidden_size"] // fields["mamba_n_heads"]
    tiny = type(config)(**fields)
    if per_layer and getattr(tiny, "layer_types", None):
        # Gemma 4 changes the type of its last layer.
        shrunk: Any = _shrunk_layers(per_layer, types, tiny.layer_types)
        tiny.per_layer_config = shrunk
    return tiny


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a config with random weights, all of which affect the output; float32, always the same."""
    config = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1)
            parameter.requires_grad_()
        # Large, so that the epsilon of norms is negligible.
        cast(nn.Embedding, model.get_input_embeddings()).weight.data *= 10
    return model


def parameters_of(config: PreTrainedConfig) -> int:
    """Number of parameters of the stock model of a config."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def _shrunk_layers(
    per_layer: Mapping[object, Mapping[str, object]], types: list[object], tiny_types: list[object]
) -> dict[int, dict[str, object]]:
    """The fields that a tiny config, with layers of `tiny_types`, sets for single layers: the fields of the first layer
    of the same type."""
    by_layer, shrunk = fields_by_layer(per_layer), dict[int, dict[str, object]]()
    for layer, layer_type in enumerate(tiny_types):
        if fields := by_layer.get(types.index(layer_type)):
            shrunk[layer] = {name: _shrunk(name, value, 0) for name, value in fields.items()}
    return shrunk


def _shrunk(name: str, value: Any, layers: int) -> Any:
    """The value of a config field in a tiny model; lists with an entry for each of so many layers are sampled."""
    if name == "attn_layer_indices" and value:
        return [1, 3]
    if isinstance(value, list | tuple) and len(value) == layers:
        return [_shrunk(name, entry, 0) for entry in _sampled(list(value))]
    if isinstance(value, Mapping) and name == "rope_parameters":
        if any(isinstance(parameters, Mapping) for parameters in value.values()):
            return {kind: _shrunk(name, parameters, layers) for kind, parameters in value.items()}
        plain = {
            key: value[key] for key in value if key in ("rope_theta", "partial_rotary_factor", "mrope_interleaved")
        }
        if "mrope_section" in value:
            half = int(_WIDTH * value.get("partial_rotary_factor", 1)) // 2
            plain["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]
        return plain | {"rope_type": value["rope_type"] if value.get("rope_type") == "proportional" else "default"}
    is_size = isinstance(value, int) and not isinstance(value, bool)
    if not is_size or name not in _SIZES:
        return value
    # Sizes of state-space mixers depend on each other.
    return _SIZES[name] if name.startswith("mamba_") and value else min(value, _SIZES[name])


def _sampled(entries: list[object]) -> list[object]:
    """The entries of a tiny model's layers: every distinct entry, in order, then the first ones again."""
    distinct = [entry for index, entry in enumerate(entries) if entry not in entries[:index]]
    return (distinct + entries)[:_LAYERS]


_HEADS, _KEY_VALUE_HEADS = "num_attention_heads", "num_key_value_heads"
_MOST_PARAMETERS = 50_000_000
# The change of a width that shows which shapes depend on it.
_STEP = 16
_Shapes = dict[str, tuple[int, ...]]


def infer_architecture(config: PreTrainedConfig) -> Architecture:
    """The removable parts of the models of a family, read off a tiny model of the config of a stock model."""
    try:
        tiny = tiny_config(config)
        if (size := parameters_of(tiny)) > _MOST_PARAMETERS:
            raise AdaPrunerError(f"a {config.model_type} cannot be made small: {size:,} parameters are left")
        # In some families, layers already differ; the values of most layers are read then.
        tiny.allow_global_per_layer_attribute_access = True
        model = random_model(tiny)
        path, layers = _layer_list(model)
        # One layer for each set of shapes; the last of each, because first layers may be special.
        shapes = [tuple((name, tuple(w.shape)) for name, w in layer.named_parameters()) for layer in layers]
        last = {of_layer: index for index, of_layer in enumerate(shapes)}
        distinct = [Layer(model, path, layers, index) for index in sorted(last.values())]
    except AdaPrunerError:
        raise
    except Exception as error:  # anything that a model class raises over sizes for which it was not made
        raise AdaPrunerError(
            f"a small {config.model_type} cannot be run to find out how it is built: {reason(error)}"
        ) from error
    return _architecture(model, _Counting(tiny, path), path, distinct)


def _layer_list(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """The path and the modules of the list of decoder layers: of the lists of this length, the largest."""
    count = model.config.num_hidden_layers
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if not lists:
        raise AdaPrunerError(f"a {model.config.model_type} has no list of {count} decoder layers")
    path = max(lists, key=lambda path: sum(parameter.numel() for parameter in lists[path].parameters()))
    return path, list(lists[path])


class _Counting:
    """The config fields that count groups, found by changing one at a time and comparing the shapes in the layers."""

    def __init__(self, config: PreTrainedConfig, layers: str) -> None:
        self.config, self._layers = config, layers
        self.now, embedding = self.shapes({})
        self._wider: dict[str, _Shapes] = {}
        self._doubled: dict[str, _Shapes] = {}
        for name, value in config.to_dict().items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
                continue
            for by_field, changed in ((self._wider, (value or 0) + _STEP), (self._doubled, 2 * (value or 0))):
                shapes, changed_embedding = self.shapes({name: changed}) if changed else ({}, None)
                # Fields that change the embedding are the hidden size or the vocabulary.
                if shapes and shapes != self.now and changed_embedding == embedding:
                    by_field[name] = shapes

    def shapes(self, changes: Mapping[str, object]) -> tuple[_Shapes, tuple[int, ...] | None]:
        """Shapes of all tensors in the layers, and of the input embedding, with other fields; none if such a model
        cannot be built."""
        config = copy.deepcopy(self.config)
        try:
            for name, value in changes.items():
                setattr(config, name, value)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            embedding = tuple(model.get_input_embeddings().weight.shape)
        except Exception:  # anything that a config or model class raises over an unexpected value
            return {}, None
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: tuple(tensors[name].shape) for name in tensors if name.startswith(f"{self._layers}.")}, embedding

    def width_field(self, parameter: str, axis: int) -> str | None:
        """The field that gives the width of an axis of a parameter."""
        size = self.now[parameter][axis]
        for name, shapes in self._wider.items():
            value = getattr(self.config, name)
            # The width is the value itself, not derived from it.
            if value in (None, size) and parameter in shapes and shapes[parameter][axis] == (value or 0) + _STEP:
                return name
        return None

    def widened(self, layer: str, field: str) -> set[str]:
        """The tensors of a layer whose shapes change with a field."""
        shapes = self._wider[field]
        return {name for name, before in self.now.items() if name.startswith(f"{layer}.") and shapes[name] != before}

    def expert_field(self, layer: str) -> tuple[str, dict[str, int]] | None:
        """The field that counts experts, and the axis of the experts in every tensor of a layer."""
        before = {name: shape for name, shape in self.now.items() if name.startswith(f"{layer}.")}
        for field, shapes in self._doubled.items():
            count, axes = getattr(self.config, field), dict[str, int]()
            for name, shape in before.items():
                after = shapes.get(name)
                if after == shape:
                    continue
                changed = [axis for axis, size in enumerate(shape) if after is None or after[axis] != size]
                if after is None or len(changed) != 1 or (shape[changed[0]], after[changed[0]]) != (count, 2 * count):
                    break
                axes[name.removeprefix(f"{layer}.")] = changed[0]
            else:
                if any(len(before[f"{layer}.{name}"]) == 3 and axis == 0 for name, axis in axes.items()):
                    return field, axes
        return None


@dataclass(frozen=True)
class _Kind:
    """A kind of groups in one layer: the projections, the config fields by their names in `Architecture`, and the
    number of parameters in the projections."""

    names: ProjectionNames
    fields: dict[str, Any]
    parameters: int


def _architecture(model: PreTrainedModel, counting: _Counting, path: str, layers: Sequence[Layer]) -> Architecture:
    by_output: dict[str, dict[str, list[_Kind]]] = {"attention": {}, "feed_forward": {}}
    counted = {layer: found for layer in layers if (found := counting.expert_field(layer.path))}
    for layer in layers:
        for writer in layer.writers:
            if heads := _heads(layer, writer, counting):
                by_output["attention"].setdefault(writer.path, []).append(heads)
            # Shared experts are kept whole: every token needs them.
            elif layer not in counted and (channels := _channels(layer, writer, counting)):
                by_output["feed_forward"].setdefault(writer.path, []).append(channels)
    kinds = dict[str, _Kind]()
    for name, writers in ((name, [*writers.values()]) for name, writers in by_output.items() if writers):
        # The writer with the most parameters in all layers; its inputs are the union over the layers.
        chosen = max(writers, key=lambda layers: sum(layer.parameters for layer in layers))
        inputs = {path: rows for layer in chosen for path, rows in layer.names.inputs.items()}
        kinds[name] = replace(chosen[-1], names=chosen[0].names.model_copy(update={"inputs": inputs}))
    experts = _experts(counting, counted)
    if not kinds and experts is None:
        raise AdaPrunerError(
            f"in a {model.config.model_type}, no heads, channels or experts were found that can be removed"
        )
    fields = {name: value for kind in kinds.values() for name, value in kind.fields.items()}
    counts = {name: fields.pop(name) for name in list(fields) if name in ConfigFields.model_fields}
    longest, words = getattr(model.config, "max_position_embeddings", None), model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words)
    lengths = [table.num_embeddings for table in tables]
    return Architecture(
        model_type=model.config.model_type,
        layers=path,
        config_fields=ConfigFields(**counts),
        learned_positions=longest is not None and any(longest <= length <= longest + 2 for length in lengths),
        experts=experts,
        **(fields | {name: kind.names for name, kind in kinds.items()}),
    )


def _heads(layer: Layer, writer: Writer, counting: _Counting) -> _Kind | None:
    """The heads whose outputs a writer reads."""
    config = counting.config
    heads, key_value_heads = getattr(config, _HEADS, None), getattr(config, _KEY_VALUE_HEADS, None)
    if not heads or heads < 2 or writer.inputs % heads:
        return None
    fewer = {_HEADS: heads // 2, "head_dim": getattr(config, "head_dim", None) or writer.inputs // heads}
    if key_value_heads:
        fewer[_KEY_VALUE_HEADS] = max(1, key_value_heads // 2)
    shapes, _ = counting.shapes(fewer)
    is_narrower = bool(shapes) and 2 * shapes[writer.weight][writer.axis] == writer.inputs
    if not is_narrower and writer.inputs != config.hidden_size:
        return None
    count, parts = layer.groups(writer, heads)
    if count < 2 or count not in (heads, key_value_heads):
        return None
    inputs: dict[str, tuple[RowKind, ...]] = {}
    for rows in parts:
        passes = rows.passes(count)
        if passes is None:
            return None
        inputs[rows.parameter] = tuple(rows.kind_of_heads(stretch, count) for stretch in passes)
    fields = {"heads": _HEADS, "fixed_attention_width": not is_narrower}
    if count == key_value_heads:
        fields["key_value_heads"] = _KEY_VALUE_HEADS
    return _kind(layer, inputs, writer, fields)


def _channels(layer: Layer, writer: Writer, counting: _Counting) -> _Kind | None:
    """The feed-forward channels that a writer reads."""
    config = counting.config
    field = counting.width_field(writer.weight, writer.axis)
    # As many inputs as the hidden size may be those of any mixer.
    if field is None and writer.inputs == config.hidden_size:
        return None
    count, parts = layer.groups(writer, 0)
    if count != writer.inputs:
        return None
    inputs: dict[str, tuple[RowKind, ...]] = {}
    channel: tuple[RowKind, ...] = ("channels",)
    for rows in parts:
        passes = rows.passes(count)
        if passes is None or (field is None and rows.parameter.rpartition(".")[0] not in layer.linears):
            return None
        inputs[rows.parameter] = channel * len(passes)
    fields: dict[str, object] = {"channels": field or "intermediate_size", "fixed_channels": field is None}
    if field is None or getattr(config, field) is None:
        fields["default_channels"] = writer.inputs // config.hidden_size
    return _kind(layer, inputs, writer, fields)


def _kind(layer: Layer, inputs: Mapping[str, tuple[RowKind, ...]], writer: Writer, fields: dict[str, object]) -> _Kind:
    """The kind of groups. Its names are those of modules for weights and biases, and of other parameters themselves."""
    parameters = sum(layer.parameters[name].numel() for name in (*inputs, f"{writer.path}.weight"))
    by_module = {name.removesuffix(".weight"): kinds for name, kinds in inputs.items()}
    biases = {name for name in by_module if name.removesuffix(".bias") in by_module.keys() - {name}}
    inputs = {name: kinds for name, kinds in by_module.items() if name not in biases}
    names = ProjectionNames(inputs=inputs, output=writer.path, normalized=writer.normalized)
    names = names.model_copy(update={"returned": layer.returned(names.module)})
    return _Kind(names, fields, parameters)


def _experts(counting: _Counting, counted: Mapping[Layer, tuple[str, dict[str, int]]]) -> ExpertNames | None:
    """The experts, from the field that counts them and the axes of their tensors in each layer."""
    tensors: dict[str, int] = {}
    names: dict[str, Any] = {}
    for layer, (field, axes) in counted.items():
        tensors |= axes
        stacks = [path for path, axis in axes.items() if axis == 0]
        names = {"count": field, "channels": _expert_channels(counting, layer, stacks)}
    if not names:
        return None
    for name, fields in (("top_k", TOP_K), ("groups", EXPERT_GROUPS), ("chosen_groups", CHOSEN_GROUPS)):
        names[name] = next((field for field in fields if getattr(counting.config, field, None)), None)
    return ExpertNames(tensors=tensors, **names)


def _expert_channels(counting: _Counting, layer: Layer, stacks: Sequence[str]) -> ExpertChannels | None:
    """The channels inside the experts of a layer, if a config field counts them and nothing else."""
    writer = layer.expert_writer([path for path in stacks if path in layer.parameters])
    if writer is None:
        return None
    down = f"{layer.path}.{writer.parameter}"
    axis = writer.axes[writer.parameter]
    count, field = counting.now[down][axis], counting.width_field(down, axis)
    passes = {rows.parameter: rows.passes(count) for rows in writer.parts}
    parameters = {f"{layer.path}.{path}" for path in (writer.parameter, *passes)}
    if field is None or None in passes.values() or not passes or counting.widened(layer.path, field) != parameters:
        return None
    inputs = {
        path: tuple((stretch.stop - stretch.start) // count for stretch in stretches or ())
        for path, stretches in passes.items()
    }
    return ExpertChannels(inputs=inputs, output=writer.parameter, axes=writer.axes, count=field)
