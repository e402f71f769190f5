"""Sequential compensation: every layer is fitted on the actual outputs of the pruned layers before it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapruner.measurement._moments import add_products, solve_damped, symmetric
from adapruner.models._layers import LayerCall, enter_layers, loaded_layer, overwrite_weight
from adapruner.planning._plan import PruningPlan
from adapruner.structure._blocks import Block, Structure
from adapruner.surgery._cut import kept_indices

# One batch of so many is held out to choose the damping.
_BATCHES_PER_HELD_OUT = 4
# Tried as multiples of the mean of the diagonal.
_DAMPINGS = (1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0, 10.0)
# Share of the error of earlier layers that a layer makes up for (research/experiments/sequential-fit.md). With 1, a
# layer overfits to errors that it cannot correct and is worse on other text; with 0, errors add up.
CARRIED_SHARE = 0.5


def refit_sequentially(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    structure: Structure,
    plan: PruningPlan,
    windows: Tensor,
    progress: Callable[[int], None] | None = None,
    batch_size: int = 8,
) -> None:
    """Refits the row-wise projections of a pruned model in place, layer after layer.

    With d the hidden state after a block in the dense model, u the output of the dense layer for the state that the
    pruned layers before produce, x' the input of the pruned projection W' and r' the hidden state that its output is
    added to, W' minimises, around its value W₀ before,
    E‖(1 - s) u + s d - r' - W' x'‖² + damping · ‖W' - W₀‖², where s is `CARRIED_SHARE`, and the damping is that of the
    smallest error on held-out windows; if none is smaller than that of W₀, W₀ stays.

    Fitting x' to d alone would shrink the weights, because the errors of the pruned layers before are noise in x'; u
    has the same noise. The error of a cut attention is corrected by the feed-forward of its layer in full, because
    u is of the whole dense layer. (GPTQ, arXiv 2210.17323, fits to u.)

    Only cut projections are refitted; no layer is run after the last of these. The cost is at most two forward passes
    over the text, six through layers that lost heads and three through layers without attention. The memory is two
    hidden states and the inputs of one projection per token, and a copy of one pruned layer if the dtypes differ.

    Args:
        dense: of a family with a plain residual (`Architecture.has_plain_residual`), in the dtype in which the layers
            of both models are run.
        pruned: the result of `prune_model` for `plan`, in any dtype; its weights change.
        windows: [windows, tokens], int64; at least two.
        progress: called with 1 after every layer.
    """
    cut = {
        number: block
        for number, (block, kept) in enumerate(zip(structure.blocks, plan.blocks, strict=True))
        if 0 < len(kept.kept) < kept.groups and block.is_projected and not block.experts
    }
    batches = windows.split(min(batch_size, max(1, len(windows) // _BATCHES_PER_HELD_OUT)))
    with torch.inference_mode():
        dense_states, all_calls = map(list, zip(*enter_layers(dense, batches), strict=True))
        pruned_states = list(dense_states)

        def fit(index: int) -> None:
            calls = [batch_calls[index] for batch_calls in all_calls]
            with contextlib.ExitStack() as loaded:
                before = _Layer(loaded.enter_context(loaded_layer(dense, index)), calls, dense_states)
                layer = loaded.enter_context(loaded_layer(pruned, index))
                if pruned.dtype != dense.dtype:
                    layer = _copy_in_dtype(layer, dense.dtype)
                after = _Layer(layer, calls, pruned_states)
                blocks = {number: block for number, block in cut.items() if block.layer == index}
                for number, block in blocks.items():
                    weight = _refit(before, after, block, _kept_inputs(structure, plan, number))
                    # The layer may be a copy, or a streamed one on another device.
                    overwrite_weight(pruned, block.row_wise.parameter, weight)
                if not any(block.kind == "channels" for block in blocks.values()):
                    before.advance()
                    after.advance()

        last = max((block.layer for block in cut.values()), default=-1)
        for index in range(structure.layers):
            if index <= last:
                fit(index)
            if progress:
                progress(1)


def _copy_in_dtype(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a loaded layer with parameters of another dtype, never streamed."""
    parameters: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        for parameter in layer.parameters()
    }
    stream = vars(layer).get("stream")
    copied = copy.deepcopy(layer, parameters | {id(stream): stream})
    if stream:
        del copied.forward, copied.stream
    return copied


def _kept_inputs(structure: Structure, plan: PruningPlan, number: int) -> Tensor | None:
    """[kept], int64: the inputs of the dense down projection that the pruned one reads, if the rest of the layer is
    unchanged, so that a run of the dense layer also gives the run of the pruned one; else None."""
    block = structure.blocks[number]
    others = [kept for index, kept in enumerate(plan.blocks) if kept.layer == block.layer and index != number]
    # A norm over the channels changes the scale of the kept ones.
    projections = {part.module for part in block.matrices}
    has_norm = any(part.module not in projections for part in block.slices)
    if block.kind != "channels" or has_norm or any(len(kept.kept) < kept.groups for kept in others):
        return None
    return kept_indices(plan.blocks[number], [block.row_wise], block.inputs_of_one)[0]


@dataclass(frozen=True)
class _Seen:
    """The run of a layer on a batch: inputs and output of the watched projection, and the hidden state that the output
    is added to, [tokens, ·]."""

    inputs: Tensor
    output: Tensor
    residual: Tensor

    @property
    def state_after(self) -> Tensor:
        """[tokens, hidden], float32: the hidden state after the projection."""
        return self.residual.float() + self.output.float()


@dataclass(frozen=True)
class _Layer:
    """A decoder layer, and for each batch the call of the layer and the hidden state before it, which is moved to the
    device of the layer."""

    module: nn.Module
    calls: list[LayerCall]
    states: list[Tensor]

    def __post_init__(self) -> None:
        device = next(self.module.parameters()).device
        self.states[:] = [state.to(device) for state in self.states]

    def advance(self) -> None:
        """Replaces the hidden states by those after the layer."""
        for number, state in enumerate(self.states):
            self.states[number] = self.calls[number].run(self.module, state)

    def projection(self, block: Block) -> Any:
        """The row-wise projection of a block."""
        return self.module.get_submodule(block.row_wise.module.split(f".{block.layer}.", 1)[1])

    def watch(self, number: int, block: Block) -> _Seen:
        """Runs the layer on a batch and records the row-wise projection of a block."""
        state, seen = self.states[number], list[Tensor]()
        projection = self.projection(block)
        with projection.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output))):
            after = self.calls[number].run(self.module, state)
        inputs, output = (tensor.flatten(0, -2) for tensor in seen)
        # The attention output is added to the input of the layer, the feed-forward output gives its output.
        residual = state.flatten(0, -2) if block.kind == "heads" else after.flatten(0, -2) - output
        return _Seen(inputs, output, residual)


class _Products:
    """Sums over tokens: of the products of the inputs x of a projection, [inputs, inputs], and of these with what its
    outputs lack, [outputs, inputs]; float32."""

    def __init__(self, weight: Tensor) -> None:
        self.second = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
        self.missing = torch.zeros(weight.shape, device=weight.device)

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Adds [tokens, inputs] and [tokens, outputs], float32."""
        add_products(self.second, inputs)
        self.missing.addmm_(missing.T, inputs)


def _refit(dense: _Layer, pruned: _Layer, block: Block, kept: Tensor | None) -> Tensor:
    """Sets the weight of the pruned projection to the least-squares solution; returns it as it is stored, in float32.
    The feed-forward comes last in a layer: only its output then changes, so the hidden states are also replaced by
    those after the layer. For `kept`, see `_kept_inputs`."""
    projection = pruned.projection(block)
    weight: Tensor = block.row_wise.as_projection(projection.weight)
    kept = None if kept is None else kept.to(weight.device)
    fitted, held_out = _Products(weight), _Products(weight)
    uncut = replace(dense, states=pruned.states)
    inputs_of_pruned, last = [], len(dense.states) - 1
    for number, state in enumerate(dense.states):
        wanted, possible = dense.watch(number, block), uncut.watch(number, block)
        if kept is None:
            given = pruned.watch(number, block)
        else:  # the pruned layer differs only in this narrower projection
            narrowed = possible.inputs.index_select(-1, kept)
            given = _Seen(narrowed, projection(narrowed), possible.residual)
        missing = torch.lerp(possible.state_after, wanted.state_after, CARRIED_SHARE) - given.state_after
        is_held_out = number % _BATCHES_PER_HELD_OUT == min(last, _BATCHES_PER_HELD_OUT - 1)
        (held_out if is_held_out else fitted).add(given.inputs.float(), missing)
        if block.kind == "channels":
            dense.states[number] = (wanted.residual + wanted.output).view_as(state)
            pruned.states[number] = given.residual.view_as(state)
            inputs_of_pruned.append(given.inputs)
    refitted = (weight + _change(fitted, held_out)).float()
    weight.copy_(refitted)
    for number, inputs in enumerate(inputs_of_pruned):
        pruned.states[number] = pruned.states[number] + projection(inputs).view_as(pruned.states[number])
    return block.row_wise.as_projection(refitted)


def _change(fitted: _Products, held_out: _Products) -> Tensor:
    """[outputs, inputs], float32: the least-squares change of a weight on all tokens, with the damping whose change on
    most of them leaves the smallest error on those held out; nothing if each of these errors is larger than before."""
    second, second_held_out = symmetric(fitted.second), symmetric(held_out.second)
    scale = float(second.diagonal().mean())
    best, chosen = 0.0, None
    for relative in _DAMPINGS:
        change = solve_damped(second, relative * scale, fitted.missing.T)
        # The change of the error.
        error = float((change * (second_held_out @ change - 2 * held_out.missing.T)).sum(dtype=torch.float64))
        if error < best:
            best, chosen = error, relative
    if chosen is None:
        return torch.zeros_like(fitted.missing)
    # More tokens, and the same share of the damping in their sum.
    together, missing = second + second_held_out, fitted.missing + held_out.missing
    return solve_damped(together, chosen * float(together.diagonal().mean()), missing.T).T
