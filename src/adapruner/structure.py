"""What can be removed from a model: blocks of groups, and the tensor slices that belong to each group.

A *group* is the smallest thing that can go: a KV group (a key/value head with its query heads), a query head, or a
feed-forward channel. A *block* is all groups of one kind in one layer. A *vector* is one row or column of a weight
matrix that goes with a group. An *input* is one input of a row-wise projection (attention output, feed-forward down):
one number per token that goes with a group. Groups, vectors and inputs are numbered through over the whole model in the
order of `Structure.blocks`, so that statistics and scores are flat tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapruner.errors import AdaPrunerError
from adapruner.models import Architecture, architecture_of

Kind = Literal["heads", "channels"]
HeadGranularity = Literal["kv-group", "query-head"]


@dataclass(frozen=True)
class TensorSlice:
    """The part of one parameter that belongs to the groups of a block.

    Group g owns the indices [g * width, (g + 1) * width) of `axis`; every index stands for `elements` numbers.
    """

    parameter: str
    axis: int
    width: int
    elements: int

    @property
    def is_matrix(self) -> bool:
        """Importance is read from matrices; biases only go along."""
        return self.parameter.endswith(".weight")


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
        offsets = [0]
        for block in self.blocks:
            offsets.append(offsets[-1] + block.groups)
        return offsets

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
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    blocks: list[Block] = []
    for layer in range(model.config.num_hidden_layers):
        blocks.append(_head_block(model, architecture, shapes, layer, head_granularity))
        blocks.append(_channel_block(model, architecture, shapes, layer))
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


def _head_block(
    model: PreTrainedModel,
    architecture: Architecture,
    shapes: dict[str, torch.Size],
    layer: int,
    granularity: HeadGranularity,
) -> Block:
    config, fields, names = model.config.per_layer_config[layer], architecture.config_fields, architecture.attention
    heads = getattr(config, fields.heads)
    key_value_heads = getattr(config, fields.key_value_heads)
    head_dim = architecture.head_dim(config)
    heads_per_group = heads // key_value_heads
    by_query_head = granularity == "query-head"
    if by_query_head and heads_per_group == 1:
        raise AdaPrunerError(
            f"layer {layer} has one query head for each of its {key_value_heads} key/value heads:"
            " there are no single query heads to remove, use --head-granularity kv-group"
        )
    query_width = head_dim if by_query_head else heads_per_group * head_dim
    parts = [(names.query, 0, query_width), (names.output, 1, query_width)]
    if not by_query_head:
        parts += [(names.key, 0, head_dim), (names.value, 0, head_dim)]
    return Block(
        layer=layer,
        kind="heads",
        groups=heads if by_query_head else key_value_heads,
        slices=_slices(f"{architecture.layers}.{layer}", parts, shapes),
        config_counts={fields.heads: 1}
        if by_query_head
        else {fields.heads: heads_per_group, fields.key_value_heads: 1},
        strata=key_value_heads if by_query_head else 1,
    )


def _channel_block(
    model: PreTrainedModel, architecture: Architecture, shapes: dict[str, torch.Size], layer: int
) -> Block:
    names, field = architecture.feed_forward, architecture.config_fields.channels
    return Block(
        layer=layer,
        kind="channels",
        groups=getattr(model.config.per_layer_config[layer], field),
        slices=_slices(
            f"{architecture.layers}.{layer}", [(names.gate, 0, 1), (names.up, 0, 1), (names.down, 1, 1)], shapes
        ),
        config_counts={field: 1},
    )


def _slices(
    layer_path: str, parts: list[tuple[str, int, int]], shapes: dict[str, torch.Size]
) -> tuple[TensorSlice, ...]:
    """Slices of the weights (by axis) and, along rows, of the biases that exist."""
    slices = []
    for module, axis, width in parts:
        weight, bias = f"{layer_path}.{module}.weight", f"{layer_path}.{module}.bias"
        if weight not in shapes:
            raise AdaPrunerError(f"the model has no parameter {weight}: it is not built as its model_type says")
        slices.append(TensorSlice(weight, axis, width, elements=shapes[weight][1 - axis]))
        if axis == 0 and bias in shapes:
            slices.append(TensorSlice(bias, 0, width, elements=1))
    return tuple(slices)
