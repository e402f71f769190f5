"""Tensor slices, blocks of groups, and the structure of a model."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapruner.base.errors import AdaPrunerError
from adapruner.model.architecture import Architecture
from adapruner.options import HeadGranularity

Kind = Literal["heads", "channels", "experts"]


@dataclass(frozen=True)
class TensorSlice:
    """The part of one parameter that belongs to the groups of a block.

    Group g owns the indices [offset + g * width, offset + (g + 1) * width) of `axis`; every index holds `elements`
    numbers. A fused projection has several slices, one after the other.

    Attributes:
        axis: axis of the parameter as a projection, [outputs, inputs]; for experts, as it is stored.
        is_matrix: importance is read from matrices; biases and norms are removed with them.
        is_transposed: stored as [inputs, outputs] (`Conv1D` of transformers).
        experts: number of such parts that are stacked along the first axis of the parameter, one for each expert; 0
            for a parameter without experts. The groups of one expert come after those of another.
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
        """The axis of the stored parameter, or of the stored part of one expert."""
        return 1 - self.axis if self.is_transposed else self.axis

    def of_experts(self, parameter: Tensor) -> Tensor:
        """[experts, …]: a view of the parameter with the stored part of each expert; one part without experts."""
        return parameter if self.experts else parameter[None]

    def as_projections(self, parameter: Tensor) -> Tensor:
        """[experts, outputs, inputs]: a view of the stored matrices; one matrix without experts."""
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


@dataclass(frozen=True)
class Block:
    """All groups of one kind in one layer.

    Attributes:
        strata: number of consecutive parts of equal size, each of which loses the same number of groups (query heads
            of one KV head, channels of one expert); 1 if any group may be removed.
        config_counts: increase of each config field per kept group; if each expert has its own channels, per group of
            one expert.
        least: minimum number of kept groups, unless none is kept.
        rest: parameters that are removed with the last group: the remainder of the attention or feed-forward.
        is_normalized: a norm follows before the output of the block is added to the hidden state.
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
        return tuple(tensor_slice for tensor_slice in self.slices if tensor_slice.is_matrix)

    @property
    def part(self) -> str:
        """The part of the layer that has the groups."""
        return {"heads": "attention", "channels": "feed-forward"}.get(self.kind, self.kind)

    @property
    def is_projected(self) -> bool:
        """True if projections read the groups; False for whole experts."""
        return self.kind != "experts"

    @property
    def experts(self) -> int:
        """Number of experts that each have groups of this block; 0 without experts, and if the groups are experts."""
        return self.row_wise.experts if self.is_projected else 0

    def config_fields(self, kept: int) -> dict[str, int]:
        """The config fields of the block with `kept` groups."""
        return {field: amount * kept // (self.experts or 1) for field, amount in self.config_counts.items()}

    @property
    def row_wise(self) -> TensorSlice:
        """The projection out of the block, whose input columns are removed: attention output, feed-forward down; the
        down projections of all experts."""
        return next(matrix for matrix in self.matrices if matrix.axis == 1)

    @property
    def inputs(self) -> int:
        """Numbers that the projection reads per token; 0 without a projection."""
        return self.groups * self.row_wise.width if self.is_projected else 0

    @property
    def inputs_of_one(self) -> int:
        """Numbers that one projection reads: all inputs, or the inputs of one expert."""
        return self.inputs // (self.experts or 1)

    @property
    def slices_by_parameter(self) -> dict[str, list[TensorSlice]]:
        """The slices of each parameter; several for a fused projection."""
        by_parameter: dict[str, list[TensorSlice]] = {}
        for tensor_slice in self.slices:
            by_parameter.setdefault(tensor_slice.parameter, []).append(tensor_slice)
        return by_parameter

    @property
    def parameters_per_group(self) -> int:
        return sum(tensor_slice.width * tensor_slice.elements for tensor_slice in self.slices)


@dataclass(frozen=True)
class Structure:
    """All prunable blocks of a model, layer by layer, and its size.

    Attributes:
        architecture: architecture of the family of the model.
        total_parameters: all parameters of the model, tied ones counted once.
        embedding_parameters: parameters of the embedding and the output layer.
    """

    architecture: Architecture
    layers: int
    head_granularity: HeadGranularity
    total_parameters: int
    embedding_parameters: int
    blocks: tuple[Block, ...]

    @property
    def model_type(self) -> str:
        return self.architecture.model_type

    @property
    def whole_mixers(self) -> list[int]:
        """The layers without prunable attention."""
        return layers_without_heads(self.layers, self.blocks)

    @property
    def note(self) -> str:
        """A sentence on the layers that a table of the blocks does not show; empty if there are none."""
        return note_on_mixers(self.whole_mixers)

    @property
    def attention_parameters(self) -> dict[int, int]:
        """By layer, the parameters that are removed with its whole attention; empty if the family needs it."""
        return {
            block.layer: block.groups * block.parameters_per_group + block.rest
            for block in self.blocks
            if self.is_removable(block)
        }

    def check_removable(self, counts: Sequence[int]) -> None:
        """Raises AdaPrunerError if, of the numbers of groups that blocks keep, one is 0 that must not be."""
        for block, count in zip(self.blocks, counts, strict=True):
            if not count and not self.is_removable(block):
                raise AdaPrunerError(
                    f"the {block.part} of layer {block.layer} of this {self.model_type} cannot be removed whole"
                )

    def is_removable(self, block: Block) -> bool:
        """True if a block can be removed whole: attention, in most families."""
        return block.kind == "heads" and self.architecture.removable_attention

    @property
    def parts(self) -> dict[str, int]:
        """The parameters of the embedding with the output layer, attention, feed-forward, experts, and others (norms,
        routers, unprunable mixers); the sum is `total_parameters`."""
        parts = {"embedding": self.embedding_parameters, "attention": 0, "feed-forward": 0, "experts": 0}
        for block in self.blocks:
            parts["experts" if block.experts else block.part] += block.groups * block.parameters_per_group + block.rest
        return parts | {"other": self.total_parameters - sum(parts.values())}

    @property
    def removable_parameters(self) -> int:
        """Maximum number of parameters that can be removed while every block keeps some groups, all tokens are kept,
        and widths are not rounded."""
        least = [block.strata * math.ceil(block.least / block.strata) for block in self.blocks]
        return self.removed_parameters(least)

    def removed_parameters(self, counts: Sequence[int]) -> int:
        """Parameters that are removed when every block keeps the given number of groups."""
        return sum(
            (block.groups - count) * block.parameters_per_group + (0 if count else block.rest)
            for block, count in zip(self.blocks, counts, strict=True)
        )

    @property
    def has_experts(self) -> bool:
        """True if experts are among the groups."""
        return any(not block.is_projected for block in self.blocks)

    @property
    def cuts_experts(self) -> bool:
        """True if experts, or channels inside experts, are among the groups."""
        return self.has_experts or any(block.experts for block in self.blocks)

    @cached_property
    def group_offsets(self) -> list[int]:
        """Index of the first group of each block in flat score tensors; one more entry for the end."""
        return list(accumulate((block.groups for block in self.blocks), initial=0))

    @cached_property
    def group_of_vector(self) -> Tensor:
        """[vectors], int64: the number of the group to which each vector belongs."""
        return torch.cat(
            [
                torch.arange(offset, offset + block.groups).repeat_interleave(matrix.width)
                for offset, block in zip(self.group_offsets, self.blocks, strict=False)
                for matrix in block.matrices
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
    """The layers without a block of heads among the blocks of a structure or a plan."""
    with_heads = {block.layer for block in blocks if block.kind == "heads"}
    return [layer for layer in range(layers) if layer not in with_heads]


def note_on_mixers(layers: Iterable[int]) -> str:
    """A sentence on layers without prunable attention; empty if there are none."""
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


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
