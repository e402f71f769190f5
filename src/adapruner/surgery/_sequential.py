"""Sequential compensation: every layer is fitted on what the already pruned layers before it really produce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapruner.measurement import factorize
from adapruner.models import architecture_of, in_fastest_dtype
from adapruner.planning import PruningPlan
from adapruner.structure import Block, Structure
from adapruner.surgery._compensation import Compensation

# Share of the error of earlier layers that a layer makes up for (see docs/benchmarks.md).
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
) -> dict[str, Tensor]:
    """Refits the row-wise projections of a pruned model in place, layer after layer.

    With x the inputs of a projection in the dense model, x' those that the pruned layers before leave it, r and r' the
    hidden states that its output is added to, the projection W' minimises
    E‖W x + s (r - r') - W' x'‖² + damping · ‖W' - W₀‖² around what it was, W₀. A share s of the error that has built up
    in the layers before is made up for: with all of it, a layer bends to repair what it cannot and does worse on other
    text; with none, it is fitted to inputs that it will not see.

    Only projections out of which something was cut are refitted. The cost is that of three forward passes over the text
    (five through layers that lost heads and channels), and the memory that of three hidden states per token.

    Args:
        pruned: what `prune_model` made of `dense` by `plan`, in any dtype; its weights change.
        windows: [windows, tokens], int64; those beyond a multiple of `batch_size` are left out.
        dampings: of each block that was cut, by number (`InputMoments.damping`).
        progress: called with 1 after every layer.

    Returns:
        The new weights by parameter, in float32, for copies of the pruned model in another dtype.
    """
    layers_path = architecture_of(dense.config).layers
    batch_size = min(batch_size, len(windows))
    # Whole batches only: what the layers are called with is made for one size.
    batches = windows[: len(windows) // batch_size * batch_size].to(dense.device).split(batch_size)
    refitted: dict[str, Tensor] = {}
    with torch.inference_mode():
        calls = _layer_arguments(dense, layers_path, batches[0])
        dense_states = [dense.get_input_embeddings()(batch) for batch in batches]
        pruned_states = dense_states
        for layer in range(structure.layers):
            path = f"{layers_path}.{layer}"
            before, after = dense.get_submodule(path), pruned.get_submodule(path)
            next_dense_states: list[Tensor] = []
            for index, block in enumerate(structure.blocks):
                if block.layer == layer and len(plan.blocks[index].kept) < block.groups:
                    name = block.row_wise.parameter
                    watched = name.removeprefix(f"{path}.").removesuffix(".weight")
                    refitted[name], next_dense_states = _refit(
                        _Layer(before, calls[layer], watched, block),
                        _Layer(after, calls[layer], watched, block),
                        dense_states,
                        pruned_states,
                        dampings[index],
                        carried_share,
                    )
            next_dense_states = next_dense_states or [_hidden(before(state, **calls[layer])) for state in dense_states]
            pruned_states = (
                [_hidden(after(state, **calls[layer])) for state in pruned_states] if refitted else next_dense_states
            )
            dense_states = next_dense_states
            if progress:
                progress(1)
    return refitted


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
    cut = [
        index
        for index, (block, block_plan) in enumerate(zip(structure.blocks, plan.blocks, strict=True))
        if len(block_plan.kept) < block.groups
    ]
    dampings = {index: compensation.moments[index].damping for index in cut}
    refitted = compensate_sequentially(fast, fast_pruned, structure, plan, windows, dampings, progress=progress)
    for name, weight in refitted.items():
        pruned.get_parameter(name).data.copy_(weight)


@dataclass(frozen=True)
class _Seen:
    """What a layer did to a batch: the inputs and output of the watched projection and the hidden state that the output
    is added to, [tokens, ·] in float32, and what came out of the layer."""

    inputs: Tensor
    output: Tensor
    beside: Tensor
    after: Tensor


class _Layer:
    """A decoder layer, and the row-wise projection of one of its blocks to watch."""

    def __init__(self, module: nn.Module, arguments: dict[str, Any], projection: str, block: Block) -> None:
        self.module, self.arguments, self.block = module, arguments, block
        self.projection = module.get_submodule(projection)

    def run(self, state: Tensor) -> _Seen:
        seen: list[Tensor] = []
        hook = self.projection.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
        try:
            after = _hidden(self.module(state, **self.arguments))
        finally:
            hook.remove()
        inputs, output = (tensor.flatten(0, -2).float() for tensor in seen)
        # The attention output is added to what comes into the layer, the feed-forward output makes what leaves it.
        beside = state.flatten(0, -2).float() if self.block.kind == "heads" else after.flatten(0, -2).float() - output
        return _Seen(inputs, output, beside, after)


def _refit(
    dense: _Layer,
    pruned: _Layer,
    dense_states: list[Tensor],
    pruned_states: list[Tensor],
    damping: float,
    carried_share: float,
) -> tuple[Tensor, list[Tensor]]:
    """Sets the weight of the pruned projection to the least-squares solution.

    Returns:
        The weight in float32, and what comes out of the dense layer.
    """
    weight: Any = pruned.projection.weight
    second = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    residual = torch.zeros(weight.shape, device=weight.device)
    after, tokens = [], 0
    for dense_state, pruned_state in zip(dense_states, pruned_states, strict=True):
        wanted, given = dense.run(dense_state), pruned.run(pruned_state)
        missing = wanted.output - given.output + carried_share * (wanted.beside - given.beside)
        second.addmm_(given.inputs.T, given.inputs)
        residual.addmm_(missing.T, given.inputs)
        tokens += len(given.inputs)
        after.append(wanted.after)
    factor = factorize(second / tokens, damping)
    change = torch.cholesky_solve((residual / tokens).double().T, factor).T
    refitted: Tensor = (weight.double() + change).float()
    weight.copy_(refitted)
    return refitted, after


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _layer_arguments(model: PreTrainedModel, layers_path: str, batch: Tensor) -> list[dict[str, Any]]:
    """What the model calls each of its layers with beside the hidden state: masks, positions."""
    calls: list[dict[str, Any]] = []
    layers: Any = model.get_submodule(layers_path)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
        for layer in layers
    ]
    try:
        model.base_model(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
