"""What can be removed from a model: blocks of groups, and the tensor slices that belong to each group.

A *group* is the smallest thing that can go: a KV group (a key/value head with its query heads), a query head, or a
feed-forward channel. A *block* is all groups of one kind in one layer. A *vector* is one row or column of a weight
matrix that goes with a group. An *input* is one input of a row-wise projection (attention output, feed-forward down):
one number per token that goes with a group. Groups, vectors and inputs are numbered through over the whole model in the
order of `Structure.blocks`, so that statistics and scores are flat tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapruner.config import HeadGranularity
from adapruner.errors import AdaPrunerError
from adapruner.models import Architecture, ProjectionNames, RowKind, architecture_of

Kind = Literal["heads", "channels"]


@dataclass(frozen=True)
class TensorSlice:
    """The part of one parameter that belongs to the groups of a block.

    Group g owns the indices [offset + g * width, offset + (g + 1) * width) of `axis`; every index stands for `elements`
    numbers. A fused projection has several slices, one behind the other.

    Attributes:
        axis: of the parameter seen as a projection, [outputs, inputs].
        is_matrix: importance is read from matrices; biases and norms only go along.
        is_transposed: stored as [inputs, outputs] (`Conv1D` of transformers).
    """

    parameter: str
    axis: int
    width: int
    elements: int
    offset: int = 0
    is_matrix: bool = True
    is_transposed: bool = False

    @property
    def stored_axis(self) -> int:
        """The axis of the parameter as it is stored."""
        return 1 - self.axis if self.is_transposed else self.axis

    @property
    def module(self) -> str:
        """Path of the module that the parameter belongs to."""
        return self.parameter.rpartition(".")[0]

    def as_projection(self, parameter: Tensor) -> Tensor:
        """[outputs, inputs]: a view of the stored matrix."""
        return parameter.T if self.is_transposed else parameter


@dataclass(frozen=True)
class Block:
    """All groups of one kind in one layer.

    Attributes:
        strata: the groups fall into this many consecutive parts of equal size, each of which loses the same number
            (query heads of one KV head); 1 where any group may go.
        config_counts: how much each config field counts per group that stays.
    """

    layer: int
    kind: Kind
    groups: int
    slices: tuple[TensorSlice, ...]
    config_counts: dict[str, int]
    strata: int = 1

    @property
    def matrices(self) -> tuple[TensorSlice, ...]:
        return tuple(part for part in self.slices if part.is_matrix)

    @property
    def row_wise(self) -> TensorSlice:
        """The projection out of the block, whose input columns go: attention output, feed-forward down."""
        return next(part for part in self.matrices if part.axis == 1)

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


@dataclass(frozen=True)
class Structure:
    """All prunable blocks of a model, layer by layer, and its size.

    Attributes:
        total_parameters: all parameters of the model, tied ones counted once.
    """

    model_type: str
    layers: int
    head_granularity: HeadGranularity
    total_parameters: int
    blocks: tuple[Block, ...]

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
        widths = [block.row_wise.width for block in self.blocks for _ in range(block.groups)]
        return torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))

    @cached_property
    def block_of_group(self) -> Tensor:
        """[groups], int64: the number of the block to which each group belongs."""
        return torch.arange(len(self.blocks)).repeat_interleave(torch.tensor([block.groups for block in self.blocks]))


def build_structure(model: PreTrainedModel, head_granularity: HeadGranularity = "kv-group") -> Structure:
    """Reads the blocks of a model off its config and shapes; a model on the meta device is enough.

    Args:
        head_granularity: under grouped-query attention, whether whole KV groups go or the same number of query heads
            of every KV group. With one query head per KV head there is nothing finer than `kv-group`.

    Raises:
        AdaPrunerError: the family is not known, the model does not look as its architecture says, or query heads are
            asked for where each KV head has only one.
    """
    architecture = architecture_of(model.config)
    blocks: list[Block] = []
    for layer in range(model.config.num_hidden_layers):
        blocks.append(_head_block(model, architecture, layer, head_granularity))
        blocks.append(_channel_block(model, architecture, layer))
    return Structure(
        model_type=model.config.model_type,
        layers=model.config.num_hidden_layers,
        head_granularity=head_granularity,
        total_parameters=count_parameters(model),
        blocks=tuple(blocks),
    )


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _head_block(model: PreTrainedModel, architecture: Architecture, layer: int, granularity: HeadGranularity) -> Block:
    config, fields = model.config.per_layer_config[layer], architecture.config_fields
    heads = getattr(config, fields.heads)
    key_value_heads = getattr(config, fields.key_value_heads or fields.heads)
    head_dim = architecture.head_dim(config)
    heads_per_group = heads // key_value_heads
    by_query_head = granularity == "query-head"
    if by_query_head and heads_per_group == 1:
        raise AdaPrunerError(
            f"layer {layer} has one query head for each of its {key_value_heads} key/value heads:"
            " there are no single query heads to remove, use `head_granularity` kv-group"
        )
    query_width = head_dim if by_query_head else heads_per_group * head_dim
    key_value_width = 0 if by_query_head else head_dim
    counts = {fields.heads: 1 if by_query_head else heads_per_group}
    if fields.key_value_heads and not by_query_head:
        counts[fields.key_value_heads] = 1
    return Block(
        layer=layer,
        kind="heads",
        groups=heads if by_query_head else key_value_heads,
        slices=_slices(
            model,
            f"{architecture.layers}.{layer}",
            architecture.attention,
            {
                "query": (heads * head_dim, query_width),
                "key": (key_value_heads * head_dim, key_value_width),
                "value": (key_value_heads * head_dim, key_value_width),
                "query-key-value": (3 * heads * head_dim, 3 * head_dim),
            },
            output_width=query_width,
        ),
        config_counts=counts,
        strata=key_value_heads if by_query_head else 1,
    )


def _channel_block(model: PreTrainedModel, architecture: Architecture, layer: int) -> Block:
    channels = architecture.channels(model.config.per_layer_config[layer])
    return Block(
        layer=layer,
        kind="channels",
        groups=channels,
        slices=_slices(
            model, f"{architecture.layers}.{layer}", architecture.feed_forward, {"channels": (channels, 1)}, 1
        ),
        config_counts={architecture.config_fields.channels: 1},
    )


def _slices(
    model: PreTrainedModel,
    layer_path: str,
    names: ProjectionNames,
    rows: Mapping[RowKind, tuple[int, int]],
    output_width: int,
) -> tuple[TensorSlice, ...]:
    """Slices of what computes a block (rows of matrices, biases and norms), and of the columns of what reads it.

    Args:
        rows: how many rows of a projection compute each thing, and how many of these go with a group.
        output_width: how many columns go with a group.
    """
    slices: list[TensorSlice] = []
    for path, kinds in names.inputs.items():
        module = _module(model, f"{layer_path}.{path}")
        outputs, offset = _shape(module)[0], 0
        for kind in kinds:
            total, width = rows[kind]
            if width:
                slices += _slices_of(f"{layer_path}.{path}", module, 0, width, offset)
            offset += total
        if offset != outputs:
            raise AdaPrunerError(
                f"{layer_path}.{path} has {outputs} outputs where the config says {offset}: the model is not built as"
                " its model_type says"
            )
    reader = f"{layer_path}.{names.output}"
    return *slices, *_slices_of(reader, _module(model, reader), 1, output_width, 0)


def _slices_of(path: str, module: Any, axis: int, width: int, offset: int) -> list[TensorSlice]:
    """Of the weight of a projection, or of a norm over all its outputs; with the rows, of the bias, where there is
    one."""
    shape = _shape(module)
    elements, is_matrix = math.prod(shape) // shape[axis], len(shape) > 1
    is_transposed = isinstance(module, Conv1D)
    slices = [TensorSlice(f"{path}.weight", axis, width, elements, offset, is_matrix, is_transposed)]
    if axis == 0 and getattr(module, "bias", None) is not None:
        slices.append(TensorSlice(f"{path}.bias", 0, width, 1, offset, is_matrix=False))
    return slices


def _shape(module: Any) -> tuple[int, ...]:
    """Of its weight: outputs and inputs of a projection, all that a norm scales."""
    shape = tuple(module.weight.shape)
    return shape[::-1] if isinstance(module, Conv1D) else shape


def _module(model: PreTrainedModel, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise AdaPrunerError(f"the model has no module {path}: it is not built as its model_type says") from None
