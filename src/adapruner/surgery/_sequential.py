"""Sequential compensation: every layer is fitted on what the already pruned layers before it really produce."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapruner.measurement import add_products, solve_damped, symmetric
from adapruner.models import (
    LayerCall,
    enter_layers,
    in_fastest_dtype,
    is_streamed,
    loaded_layer,
    overwrite_weight,
)
from adapruner.planning import PruningPlan
from adapruner.structure import Block, Structure
from adapruner.surgery._compensation import Compensation
from adapruner.surgery._cut import kept_indices, kept_layers

# Share of the error of earlier layers that a layer makes up for (docs/experiments.md). With all of it, a layer bends
# to repair what it cannot and does worse on other text; with none, errors add up.
CARRIED_SHARE = 0.5


def compensate_sequentially(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    structure: Structure,
    plan: PruningPlan,
    windows: Tensor,
    dampings: dict[int, float],
    carried_share: float = CARRIED_SHARE,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
    on_refit: Callable[[str, Tensor], None] | None = None,
) -> None:
    """Refits the row-wise projections of a pruned model in place, layer after layer.

    With d the hidden state behind a block in the dense model, u what the dense layer makes of the state that the pruned
    layers before leave it, x' the input of the pruned projection W' and r' the hidden state that its output is added
    to, W' minimises, around what it was, W₀,
    E‖(1 - s) u + s d - r' - W' x'‖² + damping · ‖W' - W₀‖².

    Fitting x' to d alone would shrink the weights, because what the pruned layers before get wrong is noise in x'; u
    has the same noise. What a cut attention gets wrong is made up for by the feed-forward of its layer in full, because
    u is of the whole dense layer. (GPTQ, arXiv 2210.17323, fits to u.)

    Only cut projections are refitted; nothing is run behind the last. The cost is at most two forward passes over the
    text, six through layers that lost heads and three through those without attention; the memory two hidden states and
    the inputs of one projection per token.

    Args:
        dense: of a family with a plain residual (`Architecture.has_plain_residual`).
        pruned: what `prune_model` made of `dense` by `plan`, in any dtype; its weights change.
        windows: [windows, tokens], int64.
        dampings: of each block that was cut, by number (`InputMoments.damping`).
        progress: called with 1 after every layer.
        on_refit: called with the name and the float32 value, as stored, of every refitted parameter; for where the
            model that is run is a copy of the one that is kept.
    """
    cut = {number: structure.blocks[number] for number in _cut_blocks(structure, plan)}
    new_number = {layer: new for new, layer in enumerate(kept_layers(structure, plan))}
    with torch.inference_mode():
        dense_states, all_calls = map(list, zip(*enter_layers(dense, windows.split(batch_size)), strict=True))
        pruned_states = list(dense_states)

        def fit(index: int) -> None:
            calls = [of_batch[index] for of_batch in all_calls]
            blocks = {number: block for number, block in cut.items() if block.layer == index}
            with contextlib.ExitStack() as loaded:
                before = _Layer(loaded.enter_context(loaded_layer(dense, index)), calls, dense_states)
                if index not in new_number:
                    before.advance()
                    return
                of_pruned = loaded.enter_context(loaded_layer(pruned, new_number[index]))
                after = _Layer(of_pruned, calls, pruned_states)
                for number, block in blocks.items():
                    kept = _kept_inputs(structure, plan, number)
                    weight = _refit(before, after, block, dampings[number], carried_share, kept)
                    if on_refit:
                        own = block.row_wise.parameter
                        on_refit(own.replace(f".{index}.", f".{new_number[index]}.", 1), weight)
                if not any(block.kind == "channels" for block in blocks.values()):
                    before.advance()
                    after.advance()

        last = max((block.layer for block in cut.values()), default=-1)
        for index in range(structure.layers):
            if index <= last:
                fit(index)
            if progress:
                progress(1)


def refit_sequentially(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    structure: Structure,
    plan: PruningPlan,
    compensation: Compensation,
    windows: Tensor,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Compensates a pruned model sequentially, in place (see `compensate_sequentially`), with the layers running in the
    dtype in which they are fastest."""
    fast = in_fastest_dtype(model)
    fast_pruned = pruned if fast is model else in_fastest_dtype(pruned)
    dampings = {number: compensation.moments[number].damping for number in _cut_blocks(structure, plan)}
    # What is in place while a streamed layer is in use may be a copy on another device.
    elsewhere = fast_pruned is not pruned or is_streamed(pruned)
    overwrite = partial(overwrite_weight, pruned) if elsewhere else None
    compensate_sequentially(
        fast, fast_pruned, structure, plan, windows, dampings, progress=progress, on_refit=overwrite
    )


def _cut_blocks(structure: Structure, plan: PruningPlan) -> list[int]:
    """The numbers of the blocks of which some groups are removed and that one projection reads."""
    return [
        number
        for number, (block, kept) in enumerate(zip(structure.blocks, plan.blocks, strict=True))
        if 0 < len(kept.kept) < kept.groups and block.is_projected and not block.experts
    ]


def _kept_inputs(structure: Structure, plan: PruningPlan, number: int) -> Tensor | None:
    """[kept], int64: which inputs of the dense down projection the pruned one reads, if the rest of the layer is as in
    the dense model: running the dense layer then shows what the pruned one does. None if it is not."""
    block = structure.blocks[number]
    others = [
        kept
        for index, (other, kept) in enumerate(zip(structure.blocks, plan.blocks, strict=True))
        if other.layer == block.layer and index != number
    ]
    # A norm over the channels gives those that are kept another scale.
    projections = {part.module for part in block.matrices}
    has_norm = any(part.module not in projections for parts in block.slices_by_parameter.values() for part in parts)
    if block.kind != "channels" or has_norm or any(len(kept.kept) < kept.groups for kept in others):
        return None
    return kept_indices(plan.blocks[number], [block.row_wise], block.inputs_of_one)[0]


@dataclass(frozen=True)
class _Seen:
    """What a layer did to a batch: the inputs and output of the watched projection and the hidden state that the output
    is added to, [tokens, ·]."""

    inputs: Tensor
    output: Tensor
    beside: Tensor

    @property
    def behind(self) -> Tensor:
        """[tokens, hidden], float32: the hidden state behind the projection."""
        return self.beside.float() + self.output.float()

    def narrowed(self, projection: nn.Module, kept: Tensor) -> _Seen:
        """What a pruned layer does of which only this projection is narrower."""
        inputs = self.inputs.index_select(-1, kept)
        return _Seen(inputs, projection(inputs), self.beside)


@dataclass(frozen=True)
class _Layer:
    """A decoder layer, and for each batch what its model calls it with and the hidden state in front of it, which is
    moved to where the layer is."""

    module: nn.Module
    calls: list[LayerCall]
    states: list[Tensor]

    def __post_init__(self) -> None:
        device = next(self.module.parameters()).device
        self.states[:] = [state.to(device) for state in self.states]

    def advance(self) -> None:
        """Replaces the hidden states by those behind the layer."""
        for number, state in enumerate(self.states):
            self.states[number] = self.calls[number].run(self.module, state)

    def projection(self, block: Block) -> Any:
        """The row-wise projection of a block."""
        return self.module.get_submodule(block.row_wise_path)

    def watch(self, number: int, block: Block) -> _Seen:
        """Runs the layer on a batch and sees what the row-wise projection of a block does."""
        state, seen = self.states[number], list[Tensor]()
        projection = self.projection(block)
        with projection.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output))):
            after = self.calls[number].run(self.module, state)
        inputs, output = (tensor.flatten(0, -2) for tensor in seen)
        # The attention output is added to what comes into the layer, the feed-forward output makes what leaves it.
        beside = state.flatten(0, -2) if block.kind == "heads" else after.flatten(0, -2) - output
        return _Seen(inputs, output, beside)


def _refit(
    dense: _Layer, pruned: _Layer, block: Block, damping: float, carried_share: float, kept: Tensor | None
) -> Tensor:
    """Sets the weight of the pruned projection to the least-squares solution. The feed-forward comes last in a layer:
    its output is all that changes then, so hidden states are replaced by those behind the layer on the way.

    Args:
        kept: see `_kept_inputs`.

    Returns:
        The weight as it is stored, in float32.
    """
    projection = pruned.projection(block)
    weight: Tensor = block.row_wise.as_projection(projection.weight)
    kept = None if kept is None else kept.to(weight.device)
    second = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    residual = torch.zeros(weight.shape, device=weight.device)
    uncut = replace(dense, states=pruned.states)
    inputs_of_pruned, tokens = [], 0
    for number, state in enumerate(dense.states):
        wanted, possible = dense.watch(number, block), uncut.watch(number, block)
        given = pruned.watch(number, block) if kept is None else possible.narrowed(projection, kept)
        inputs = given.inputs.float()
        missing = torch.lerp(possible.behind, wanted.behind, carried_share) - given.behind
        add_products(second, inputs)
        residual.addmm_(missing.T, inputs)
        tokens += len(inputs)
        if block.kind == "channels":
            dense.states[number] = (wanted.beside + wanted.output).view_as(state)
            pruned.states[number] = given.beside.view_as(state)
            inputs_of_pruned.append(given.inputs)
    change = solve_damped(symmetric(second) / tokens, damping, (residual / tokens).T).T
    refitted = (weight + change).float()
    weight.copy_(refitted)
    for number, own_inputs in enumerate(inputs_of_pruned):
        beside = pruned.states[number]
        pruned.states[number] = beside + projection(own_inputs).view_as(beside)
    return block.row_wise.as_projection(refitted)
