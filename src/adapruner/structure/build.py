"""The structure of a model, read off its config and shapes."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapruner.base.errors import AdaPrunerError
from adapruner.model.architecture import Architecture, ProjectionNames, RowKind, architecture_of
from adapruner.options import ExpertGranularity, HeadGranularity
from adapruner.structure.blocks import Block, Structure, TensorSlice, count_parameters


def build_structure(
    model: PreTrainedModel, head_granularity: HeadGranularity = "kv-group", experts: ExpertGranularity = "expert"
) -> Structure:
    """Reads the blocks of a model off its config and shapes; a model on the meta device is enough.

    Args:
        head_granularity: under grouped-query attention, remove whole KV groups or the same number of query heads of
            every KV group. With one query head per KV head, `kv-group` is the finest granularity.
        experts: remove whole experts, or the same number of channels of each expert.
    """
    architecture = architecture_of(model.config)
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    expert_block = _expert_block if experts == "expert" else _expert_channel_block
    blocks: list[Block | None] = []
    for layer in range(model.config.num_hidden_layers):
        place = model, architecture, layer
        blocks += [_head_block(*place, head_granularity), _channel_block(*place), expert_block(*place)]
    return Structure(
        architecture=architecture,
        layers=model.config.num_hidden_layers,
        head_granularity=head_granularity,
        total_parameters=count_parameters(model),
        embedding_parameters=count_parameters(nn.ModuleList(module for module in embeddings if module is not None)),
        blocks=tuple(block for block in blocks if block),
    )


def _head_block(
    model: PreTrainedModel, architecture: Architecture, layer: int, granularity: HeadGranularity
) -> Block | None:
    names, fields = architecture.attention, architecture.config_fields
    path = f"{architecture.layers}.{layer}"
    if names is None or _at(model, f"{path}.{names.output}") is None:
        return None
    config = model.config.per_layer_config[layer]
    heads = getattr(config, fields.heads)
    key_value_heads = getattr(config, fields.key_value_heads or fields.heads)
    by_query_head = granularity == "query-head"
    if by_query_head and (
        heads == key_value_heads or any("query-key-value" in kinds for kinds in names.inputs.values())
    ):
        raise AdaPrunerError(
            f"layer {layer} has {heads} query heads for {key_value_heads} key/value heads"
            f"{', in one matrix' if heads > key_value_heads else ''}: there are no single query heads to remove, use"
            " `head_granularity` kv-group"
        )
    counts = {fields.heads: 1 if by_query_head else heads // key_value_heads}
    if fields.key_value_heads and not by_query_head:
        counts[fields.key_value_heads] = 1
    groups = heads if by_query_head else key_value_heads
    rows: dict[RowKind, int] = dict.fromkeys(("key", "value", "query-key-value"), key_value_heads) | {"query": heads}
    kept: set[RowKind] = {"key", "value"} if by_query_head else set()
    block = Block(
        layer=layer,
        kind="heads",
        groups=groups,
        slices=_slices(model, path, names, rows, groups, kept, architecture.head_dim(config)),
        config_counts=counts,
        strata=key_value_heads if by_query_head else 1,
        is_normalized=names.normalized,
    )
    return _with_rest(model, block, f"{path}.{names.module}")


def _channel_block(model: PreTrainedModel, architecture: Architecture, layer: int) -> Block | None:
    names, path = architecture.feed_forward, f"{architecture.layers}.{layer}"
    reader = _at(model, f"{path}.{names.output}") if names else None
    if names is None or reader is None:
        return None
    channels = _shape(reader)[1]
    block = Block(
        layer=layer,
        kind="channels",
        groups=channels,
        slices=_slices(model, path, names, {"channels": channels}, channels),
        config_counts={architecture.config_fields.channels: 1},
        is_normalized=names.normalized,
    )
    return _with_rest(model, block, f"{path}.{names.module}") if names.module else block


def _with_rest(model: PreTrainedModel, block: Block, module: str) -> Block:
    """The block with the remaining parameters of its attention or feed-forward, the module at a path."""
    in_groups = block.groups * block.parameters_per_group
    return replace(block, rest=count_parameters(model.get_submodule(module)) - in_groups)


def _expert_block(model: PreTrainedModel, architecture: Architecture, layer: int) -> Block | None:
    names, layer_path = architecture.experts, f"{architecture.layers}.{layer}"
    if names is None:
        return None
    slices = []
    for path, axis in names.tensors.items():
        tensor = _at(model, f"{layer_path}.{path}")
        if tensor is not None:
            # Buffers are cut too, but do not count as parameters.
            elements = tensor.numel() // tensor.shape[axis] if isinstance(tensor, nn.Parameter) else 0
            slices.append(TensorSlice(f"{layer_path}.{path}", axis, 1, elements, is_matrix=tensor.dim() == 3))
    if not any(tensor_slice.is_matrix for tensor_slice in slices):
        return None
    config = model.config.per_layer_config[layer]
    experts, top_k = getattr(config, names.count), getattr(config, names.top_k or "", None) or 0
    groups = getattr(config, names.groups or "", None) or 1
    # A router that chooses all experts chooses nothing, and groups are compared by their best two.
    least_in_group = max(2, math.ceil((top_k + 1) / (getattr(config, names.chosen_groups or "", None) or 1)))
    return Block(
        layer=layer,
        kind="experts",
        groups=experts,
        slices=tuple(slices),
        config_counts={names.count: 1},
        strata=groups,
        least=min(groups * least_in_group if groups > 1 else top_k + 1, experts),
    )


def _expert_channel_block(model: PreTrainedModel, architecture: Architecture, layer: int) -> Block | None:
    if architecture.experts is None:
        return None
    layer_path, names = f"{architecture.layers}.{layer}", architecture.experts.channels
    if names is None:
        raise AdaPrunerError(
            f"channels inside the experts of a {architecture.model_type} cannot be cut: use `expert_granularity` expert"
        )
    down = _at(model, f"{layer_path}.{names.output}")
    if down is None:
        return None
    experts, channels = down.shape[0], down.shape[names.axes[names.output]]
    slices: list[TensorSlice] = []
    for path, widths in {**names.inputs, names.output: (1,)}.items():
        name, axis, offset = f"{layer_path}.{path}", int(path == names.output), 0
        tensor = _at(model, name)
        if tensor is None:
            continue
        elements, is_matrix = tensor[0].numel() // tensor.shape[names.axes[path]], tensor.dim() == 3
        is_transposed = is_matrix and names.axes[path] - 1 != axis
        for width in widths:
            slices.append(TensorSlice(name, axis, width, elements, offset, is_matrix, is_transposed, experts))
            offset += width * channels
    return Block(
        layer=layer,
        kind="channels",
        groups=experts * channels,
        slices=tuple(slices),
        config_counts={names.count: 1},
        strata=experts,
        least=experts,
    )


def _slices(
    model: PreTrainedModel,
    layer_path: str,
    names: ProjectionNames,
    counts: Mapping[RowKind, int],
    groups: int,
    kept: Collection[RowKind] = (),
    width: int = 1,
) -> tuple[TensorSlice, ...]:
    """Slices of the parameters that compute a block (rows of matrices, biases and norms), and of the columns of the
    projection that reads it.

    Args:
        counts: number of heads or channels for each kind of row in a projection.
        kept: kinds of rows that are not removed with a group.
        width: rows per head or channel in projections with several kinds.
    """
    slices: list[TensorSlice] = []
    for path, kinds in names.inputs.items():
        name = f"{layer_path}.{path}"
        projection = _at(model, name)
        if projection is None:
            continue
        outputs, offset = _shape(projection)[0], 0
        sizes = [counts[kind] * width for kind in kinds] if len(kinds) > 1 else [outputs]
        if sum(sizes) != outputs or any(size % counts[kind] for size, kind in zip(sizes, kinds, strict=True)):
            raise AdaPrunerError(
                f"{name} has {outputs} outputs, but the config says {' + '.join(map(str, sizes))}, for"
                f" {', '.join(f'{counts[kind]} {kind}' for kind in kinds)}: the model is not built as its model_type"
                " says"
            )
        for kind, size in zip(kinds, sizes, strict=True):
            if kind not in kept:
                slices += _slices_of(name, projection, 0, size // groups, offset)
            offset += size
    path = f"{layer_path}.{names.output}"
    reader = _at(model, path)
    return *slices, *_slices_of(path, reader, 1, _shape(reader)[1] // groups, 0)


def _slices_of(path: str, module: object, axis: int, width: int, offset: int) -> list[TensorSlice]:
    """Slices of the weight of a projection or norm, and, along the outputs, of its bias; or of a single parameter."""
    shape = _shape(module)
    elements, is_matrix = math.prod(shape) // shape[axis], len(shape) > 1
    if isinstance(module, Tensor):
        return [TensorSlice(path, axis, width, elements, offset, is_matrix=False)]
    is_transposed = isinstance(module, Conv1D)
    slices = [TensorSlice(f"{path}.weight", axis, width, elements, offset, is_matrix, is_transposed)]
    if axis == 0 and getattr(module, "bias", None) is not None:
        slices.append(TensorSlice(f"{path}.bias", 0, width, 1, offset, is_matrix=False))
    return slices


def _shape(module: Any) -> tuple[int, ...]:
    """Shape of the weight: [outputs, inputs] of a projection, [outputs] of a norm; or of a single parameter."""
    shape = tuple(module.shape if isinstance(module, Tensor) else module.weight.shape)
    return shape[::-1] if isinstance(module, Conv1D) else shape


def _at(model: PreTrainedModel, path: str) -> Any:
    """The module, parameter or buffer at a path; None if the model has none."""
    return reduce(lambda module, name: getattr(module, name, None), path.split("."), cast(object, model))
