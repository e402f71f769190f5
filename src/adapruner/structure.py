"""What can be removed from a model: blocks of groups, and the tensor slices that belong to each group.

A *group* is the smallest thing that can be removed: a KV group (a key/value head with its query heads), a query head, a
feed-forward channel, or an expert. A *block* is all groups of one kind in one layer. A *vector* is one row or column of
a weight matrix that is removed with a group, or one expert in a stack of matrices. An *input* is one input of a
row-wise projection (attention output, feed-forward down): one number per token that is removed with a group. Groups,
vectors and inputs are numbered through over the whole model in the order of `Structure.blocks`, so that statistics and
scores are flat tensors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapruner.config import ExpertGranularity, HeadGranularity
from adapruner.errors import AdaPrunerError
from adapruner.models import Architecture, ProjectionNames, RowKind, Whole, architecture_of

Kind = Literal["heads", "channels", "experts"]


@dataclass(frozen=True)
class TensorSlice:
    """The part of one parameter that belongs to the groups of a block.

    Group g owns the indices [offset + g * width, offset + (g + 1) * width) of `axis`; every index stands for `elements`
    numbers. A fused projection has several slices, one behind the other.

    Attributes:
        axis: of the parameter seen as a projection, [outputs, inputs]; of the experts, as it is stored.
        is_matrix: importance is read from matrices; biases and norms only go along.
        is_transposed: stored as [inputs, outputs] (`Conv1D` of transformers).
        experts: how many such parts are stacked along the first axis of the parameter, one for each expert, all of them
            as described; 0 where there is only the one. The groups of one expert come after those of another.
    """

    parameter: str
    axis: int
    width: int
    elements: int
    offset: int = 0
    is_matrix: bool = True
    is_transposed: bool = False
    experts: int = 0

    @property
    def stored_axis(self) -> int:
        """The axis of the parameter, or of the part of one expert, as it is stored."""
        return 1 - self.axis if self.is_transposed else self.axis

    def of_experts(self, parameter: Tensor) -> Tensor:
        """[experts, …]: a view of the parameter with one part for each expert, as they are stored; one part where there
        are no experts."""
        return parameter if self.experts else parameter[None]

    def as_projections(self, parameter: Tensor) -> Tensor:
        """[experts, outputs, inputs]: a view of the stored matrices; one where there are no experts."""
        matrices = self.of_experts(parameter)
        return matrices.mT if self.is_transposed else matrices

    @property
    def module(self) -> str:
        """Path of the module that the parameter belongs to."""
        return self.parameter.rpartition(".")[0]

    def as_stored(self, matrices: Tensor) -> Tensor:
        """The inverse of `as_projections`."""
        stored = (matrices.mT if self.is_transposed else matrices).contiguous()
        return stored if self.experts else stored[0]

    def as_projection(self, parameter: Tensor) -> Tensor:
        """[outputs, inputs]: a view of the stored matrix, where there are no experts."""
        return parameter.T if self.is_transposed else parameter


@dataclass(frozen=True)
class Block:
    """All groups of one kind in one layer.

    Attributes:
        strata: the groups fall into this many consecutive parts of equal size, each of which loses the same number
            (query heads of one KV head, channels of one expert); 1 where any group may go.
        config_counts: how much each config field counts per kept group; where each expert has channels of its
            own, per group of one expert.
        least: how many groups must be kept, unless none is.
        rest: parameters that are removed with the last group: what is left of the attention or feed-forward.
        is_normalized: whether a norm follows before what reads the groups is added to the hidden state.
    """

    layer: int
    kind: Kind
    groups: int
    slices: tuple[TensorSlice, ...]
    config_counts: dict[str, int]
    strata: int = 1
    least: int = 1
    rest: int = 0
    is_normalized: bool = False

    @property
    def matrices(self) -> tuple[TensorSlice, ...]:
        return tuple(part for part in self.slices if part.is_matrix)

    @property
    def is_projected(self) -> bool:
        """Whether projections read the groups; experts as a whole have none."""
        return self.kind != "experts"

    @property
    def experts(self) -> int:
        """How many experts have groups of this block, each its own; 0 where the groups are of no expert, or experts."""
        return self.row_wise.experts if self.is_projected else 0

    def config_fields(self, kept: int) -> dict[str, int]:
        """What the config says of the block when so many groups are kept."""
        return {field: amount * kept // (self.experts or 1) for field, amount in self.config_counts.items()}

    @property
    def row_wise(self) -> TensorSlice:
        """The projection out of the block, whose input columns go: attention output, feed-forward down; of experts, the
        down projections of all."""
        return next(part for part in self.matrices if part.axis == 1)

    @property
    def inputs(self) -> int:
        """How many numbers that projection reads per token; 0 where there is none."""
        return self.groups * self.row_wise.width if self.is_projected else 0

    @property
    def inputs_of_one(self) -> int:
        """How many numbers one of the projections reads: all inputs, or those of one expert."""
        return self.inputs // (self.experts or 1)

    @property
    def row_wise_path(self) -> str:
        """Where that projection is in its layer."""
        return self.row_wise.module.split(f".{self.layer}.", 1)[1]

    @property
    def slices_by_parameter(self) -> dict[str, list[TensorSlice]]:
        """The slices of each parameter; several where it is a fused projection."""
        by_parameter: dict[str, list[TensorSlice]] = {}
        for part in self.slices:
            by_parameter.setdefault(part.parameter, []).append(part)
        return by_parameter

    @property
    def parameters_per_group(self) -> int:
        return sum(part.width * part.elements for part in self.slices)

    def with_rest(self, model: PreTrainedModel, module: str | None) -> Block:
        """The block with `rest`.

        Args:
            module: path of the attention or feed-forward; None where that is the layer.
        """
        if module is None:
            return self
        return replace(
            self, rest=count_parameters(model.get_submodule(module)) - self.groups * self.parameters_per_group
        )


@dataclass(frozen=True)
class Structure:
    """All prunable blocks of a model, layer by layer, and its size.

    Attributes:
        total_parameters: all parameters of the model, tied ones counted once.
        embedding_parameters: of these, those of the embedding and the output layer.
        layer_parameters: of these, those of each layer.
        whole: what of a layer can be removed whole.
    """

    model_type: str
    layers: int
    head_granularity: HeadGranularity
    total_parameters: int
    embedding_parameters: int
    blocks: tuple[Block, ...]
    layer_parameters: tuple[int, ...]
    whole: frozenset[Whole]

    @property
    def whole_mixers(self) -> list[int]:
        """The layers without an attention that can be cut."""
        return layers_without_heads(self.layers, self.blocks)

    @property
    def note(self) -> str:
        """What a table of the blocks does not show."""
        return note_on_mixers(self.whole_mixers)

    @property
    def removable_layers(self) -> list[int]:
        """The layers that can be removed whole: those with an attention and a feed-forward, or experts, that
        can be cut."""
        kinds: dict[int, set[Kind]] = {}
        for block in self.blocks:
            kinds.setdefault(block.layer, set()).add(block.kind)
        return [layer for layer, own in kinds.items() if "layer" in self.whole and "heads" in own and len(own) > 1]

    def whole_parameters(self, whole: Whole) -> dict[int, int]:
        """By layer, the parameters that are removed with its attention, its feed-forward, or all of it, where it has
        one that can be cut."""
        if whole == "layer":
            return {layer: self.layer_parameters[layer] for layer in self.removable_layers}
        kind = "heads" if whole == "attention" else "channels"
        return {
            block.layer: block.groups * block.parameters_per_group + block.rest
            for block in self.blocks
            if block.kind == kind and not block.experts
        }

    @property
    def parts(self) -> dict[str, int]:
        """How the parameters are divided among the embedding with the output layer, attention, feed-forward, experts,
        and others (norms, routers, mixers that cannot be cut); the sum is `total_parameters`."""
        parts = {"embedding": self.embedding_parameters, "attention": 0, "feed-forward": 0, "experts": 0}
        for block in self.blocks:
            of_experts = block.kind == "experts" or block.experts
            part = "experts" if of_experts else "attention" if block.kind == "heads" else "feed-forward"
            parts[part] += block.groups * block.parameters_per_group + block.rest
        return parts | {"other": self.total_parameters - sum(parts.values())}

    @property
    def removable_parameters(self) -> int:
        """Parameters that can be removed at most while every block keeps some groups, all tokens are kept, and widths
        are not rounded."""
        least = [block.strata * math.ceil(block.least / block.strata) for block in self.blocks]
        return self.removed_parameters(least)

    def removed_layers(self, counts: Sequence[int]) -> list[int]:
        """The layers of which nothing is kept.

        Args:
            counts: how many groups each block keeps.
        """
        left = {block.layer for block, count in zip(self.blocks, counts, strict=True) if count}
        return [layer for layer in self.removable_layers if layer not in left]

    def removed_parameters(self, counts: Sequence[int]) -> int:
        """Parameters that are removed when every block keeps the given number of groups."""
        gone = set(self.removed_layers(counts))
        of_blocks = sum(
            (block.groups - count) * block.parameters_per_group + (0 if count else block.rest)
            for block, count in zip(self.blocks, counts, strict=True)
            if block.layer not in gone
        )
        return of_blocks + sum(self.layer_parameters[layer] for layer in gone)

    @property
    def has_experts(self) -> bool:
        """Whether experts are among the groups."""
        return any(not block.is_projected for block in self.blocks)

    @property
    def cuts_experts(self) -> bool:
        """Whether experts, or channels inside of them, are among the groups."""
        return self.has_experts or any(block.experts for block in self.blocks)

    @cached_property
    def group_offsets(self) -> list[int]:
        """Where the groups of each block begin in flat score tensors; one more entry for the end."""
        return list(accumulate((block.groups for block in self.blocks), initial=0))

    @cached_property
    def group_of_vector(self) -> Tensor:
        """[vectors], int64: the number of the group to which each vector belongs."""
        return torch.cat(
            [
                torch.arange(offset, offset + block.groups).repeat_interleave(part.width)
                for offset, block in zip(self.group_offsets, self.blocks, strict=False)
                for part in block.matrices
            ]
        )

    @cached_property
    def block_of_vector(self) -> Tensor:
        """[vectors], int64: the number of the block to which each vector belongs."""
        return self.block_of_group[self.group_of_vector]

    @cached_property
    def group_of_input(self) -> Tensor:
        """[inputs], int64: the number of the group to which each input of a row-wise projection belongs."""
        widths = [block.inputs // block.groups for block in self.blocks for _ in range(block.groups)]
        return torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))

    @cached_property
    def block_of_group(self) -> Tensor:
        """[groups], int64: the number of the block to which each group belongs."""
        return torch.arange(len(self.blocks)).repeat_interleave(torch.tensor([block.groups for block in self.blocks]))


def layers_without_heads(layers: int, blocks: Iterable[Any]) -> list[int]:
    """The layers of which no block of heads is among some blocks, of a structure or a plan."""
    with_heads = {block.layer for block in blocks if block.kind == "heads"}
    return [layer for layer in range(layers) if layer not in with_heads]


def note_on_mixers(layers: Iterable[int]) -> str:
    """Says which layers have no attention, or another mixer in its place; empty where there are none."""
    shown = show_layers(layers)
    return f"layers {shown} have no attention that can be cut" if shown else ""


def show_layers(layers: Iterable[int]) -> str:
    """Ascending numbers of layers as ranges: `0–3, 5`."""
    stretches: list[list[int]] = []
    for layer in layers:
        if stretches and stretches[-1][-1] == layer - 1:
            stretches[-1].append(layer)
        else:
            stretches.append([layer])
    return ", ".join("–".join(map(str, sorted({stretch[0], stretch[-1]}))) for stretch in stretches)


def build_structure(
    model: PreTrainedModel, head_granularity: HeadGranularity = "kv-group", experts: ExpertGranularity = "expert"
) -> Structure:
    """Reads the blocks of a model off its config and shapes; a model on the meta device is enough.

    Args:
        head_granularity: under grouped-query attention, whether whole KV groups go or the same number of query heads
            of every KV group. With one query head per KV head there is nothing finer than `kv-group`.
        experts: whether experts go as a whole, or the same number of channels of each.

    Raises:
        AdaPrunerError: the family is not known, the model does not look as its architecture says, query heads are
            requested where each KV head has only one, or channels of experts where none can be cut.
    """
    architecture = architecture_of(model.config)
    layers: Any = model.get_submodule(architecture.layers)
    blocks: list[Block] = []
    for layer in range(model.config.num_hidden_layers):
        blocks += _head_blocks(model, architecture, layer, head_granularity)
        blocks += _channel_blocks(model, architecture, layer)
        make = _expert_blocks if experts == "expert" else _expert_channel_blocks
        blocks += make(model, architecture, layer)
    return Structure(
        model_type=model.config.model_type,
        layers=model.config.num_hidden_layers,
        head_granularity=head_granularity,
        total_parameters=count_parameters(model),
        embedding_parameters=_embedding_parameters(model),
        blocks=tuple(blocks),
        layer_parameters=tuple(count_parameters(layer) for layer in layers),
        whole=architecture.removable_whole(model.config),
    )


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _embedding_parameters(model: PreTrainedModel) -> int:
    """Those of the embedding and the output layer, tied ones counted once."""
    both = [model.get_input_embeddings(), model.get_output_embeddings()]
    return count_parameters(nn.ModuleList(module for module in both if module is not None))


def _head_blocks(
    model: PreTrainedModel, architecture: Architecture, layer: int, granularity: HeadGranularity
) -> list[Block]:
    names, fields = architecture.attention, architecture.config_fields
    layer_path = f"{architecture.layers}.{layer}"
    if names is None or not _has(model, f"{layer_path}.{names.output}"):
        return []
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
    rows: dict[RowKind, int] = {"query": heads, "key": key_value_heads, "value": key_value_heads}
    rows["query-key-value"] = key_value_heads
    return [
        Block(
            layer=layer,
            kind="heads",
            groups=groups,
            slices=_slices(
                model,
                layer_path,
                names,
                rows,
                groups,
                {"key", "value"} if by_query_head else set(),
                architecture.head_dim(config),
            ),
            config_counts=counts,
            strata=key_value_heads if by_query_head else 1,
            is_normalized=names.normalized,
        ).with_rest(model, f"{layer_path}.{names.module}")
    ]


def _channel_blocks(model: PreTrainedModel, architecture: Architecture, layer: int) -> list[Block]:
    names, layer_path = architecture.feed_forward, f"{architecture.layers}.{layer}"
    if names is None or not _has(model, f"{layer_path}.{names.output}"):
        return []
    channels = _shape(model.get_submodule(f"{layer_path}.{names.output}"))[1]
    return [
        Block(
            layer=layer,
            kind="channels",
            groups=channels,
            slices=_slices(model, layer_path, names, {"channels": channels}, channels),
            config_counts={architecture.config_fields.channels: 1},
            is_normalized=names.normalized,
        ).with_rest(model, f"{layer_path}.{names.module}" if names.module else None)
    ]


def _expert_blocks(model: PreTrainedModel, architecture: Architecture, layer: int) -> list[Block]:
    names, layer_path = architecture.experts, f"{architecture.layers}.{layer}"
    if names is None:
        return []
    slices = []
    for path, axis in names.tensors.items():
        tensor = _tensor(model, f"{layer_path}.{path}")
        if tensor is not None:
            # Buffers are cut with the parameters, and are none.
            elements = tensor.numel() // tensor.shape[axis] if isinstance(tensor, nn.Parameter) else 0
            slices.append(TensorSlice(f"{layer_path}.{path}", axis, 1, elements, is_matrix=tensor.dim() == 3))
    if not any(part.is_matrix for part in slices):
        return []
    config = model.config.per_layer_config[layer]
    experts, top_k = getattr(config, names.count), getattr(config, names.top_k or "", None) or 0
    groups = getattr(config, names.groups or "", None) or 1
    # A router that chooses all experts chooses nothing, and groups are compared by their best two.
    of_group = max(2, math.ceil((top_k + 1) / (getattr(config, names.chosen_groups or "", None) or 1)))
    return [
        Block(
            layer=layer,
            kind="experts",
            groups=experts,
            slices=tuple(slices),
            config_counts={names.count: 1},
            strata=groups,
            least=min(groups * of_group if groups > 1 else top_k + 1, experts),
        )
    ]


def _expert_channel_blocks(model: PreTrainedModel, architecture: Architecture, layer: int) -> list[Block]:
    names, layer_path = architecture.experts, f"{architecture.layers}.{layer}"
    if names is None:
        return []
    own = names.channels
    if own is None:
        raise AdaPrunerError(
            f"the channels inside the experts of a {architecture.model_type} cannot be cut: use `expert_granularity`"
            " expert"
        )
    down = _tensor(model, f"{layer_path}.{own.output}")
    if down is None:
        return []
    experts, channels = down.shape[0], down.shape[own.axes[own.output]]
    slices: list[TensorSlice] = []
    for path, widths in {**own.inputs, own.output: (1,)}.items():
        tensor, axis, offset = _tensor(model, f"{layer_path}.{path}"), int(path == own.output), 0
        if tensor is None:
            continue
        elements, is_matrix = tensor[0].numel() // tensor.shape[own.axes[path]], tensor.dim() == 3
        is_transposed = is_matrix and own.axes[path] - 1 != axis
        for width in widths:
            name = f"{layer_path}.{path}"
            slices.append(TensorSlice(name, axis, width, elements, offset, is_matrix, is_transposed, experts))
            offset += width * channels
    return [
        Block(
            layer=layer,
            kind="channels",
            groups=experts * channels,
            slices=tuple(slices),
            config_counts={own.count: 1},
            strata=experts,
            least=experts,
        )
    ]


def _slices(
    model: PreTrainedModel,
    layer_path: str,
    names: ProjectionNames,
    counts: Mapping[RowKind, int],
    groups: int,
    kept: Collection[RowKind] = (),
    width: int = 1,
) -> tuple[TensorSlice, ...]:
    """Slices of what computes a block (rows of matrices, biases and norms), and of the columns of what reads it.

    Args:
        counts: how many there are of each thing that rows of a projection compute, all of it in one parameter.
        kept: what is not removed with a group.
        width: rows of each thing where one projection computes several.
    """
    slices: list[TensorSlice] = []
    for path, kinds in names.inputs.items():
        name = f"{layer_path}.{path}"
        module = model.get_submodule(name) if _has(model, name) else _tensor(model, name)
        if module is None:
            continue
        outputs, offset = _shape(module)[0], 0
        sizes = [counts[kind] * width for kind in kinds] if len(kinds) > 1 else [outputs]
        if sum(sizes) != outputs or any(size % counts[kind] for size, kind in zip(sizes, kinds, strict=True)):
            raise AdaPrunerError(
                f"{name} has {outputs} outputs where the config says {' + '.join(map(str, sizes))}, for"
                f" {', '.join(f'{counts[kind]} {kind}' for kind in kinds)}: the model is not built as its model_type"
                " says"
            )
        for kind, size in zip(kinds, sizes, strict=True):
            if kind not in kept:
                slices += _slices_of(name, module, 0, size // groups, offset)
            offset += size
    reader = f"{layer_path}.{names.output}"
    module = model.get_submodule(reader)
    return *slices, *_slices_of(reader, module, 1, _shape(module)[1] // groups, 0)


def _slices_of(path: str, module: Any, axis: int, width: int, offset: int) -> list[TensorSlice]:
    """Of the weight of a projection, or of a norm over all its outputs; with the rows, of the bias, where there is
    one. Of a parameter, itself."""
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
    """Of its weight: outputs and inputs of a projection, all that a norm scales."""
    shape = tuple(module.shape if isinstance(module, Tensor) else module.weight.shape)
    return shape[::-1] if isinstance(module, Conv1D) else shape


def _has(model: PreTrainedModel, path: str) -> bool:
    """Whether a model has such a module."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _tensor(model: PreTrainedModel, name: str) -> Tensor | None:
    """A parameter or buffer of a model."""
    path, _, own = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), own, None) if _has(model, path) else None
    return tensor if isinstance(tensor, Tensor) else None
