"""Experts of mixtures: which tokens a router sends to each, and what the expert makes of them."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapruner.base.errors import AdaPrunerError, NonFiniteError
from adapruner.model.layers import enter_layers, loaded_layer
from adapruner.structure.blocks import Block, Structure

_WINDOWS_AT_ONCE = 8


@torch.inference_mode()
def measure_routing(
    model: PreTrainedModel, structure: Structure, windows: Tensor, progress: Callable[[int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """What each expert is worth to a text, from one forward pass, layer by layer.

    Args:
        windows: [windows, tokens], int64.
        progress: called with 1 after every layer.

    Returns:
        [groups], float32, twice, zeros for groups that are no experts: the number of tokens that are sent to an expert,
        and the mean over these of router weight · ‖output‖ (REAP, arXiv 2510.13999).

    Raises:
        AdaPrunerError: the experts of this family are not called with the hidden states, the numbers of the chosen
            experts, and their weights.
    """
    batches = windows.split(_WINDOWS_AT_ONCE)
    states, calls = map(list, zip(*enter_layers(model, batches), strict=True))
    output, tokens = torch.zeros(2, structure.group_offsets[-1], device=model.device)
    for index in range(structure.layers):
        own = [n for n, block in enumerate(structure.blocks) if block.kind == "experts" and block.layer == index]
        with loaded_layer(model, index) as layer, contextlib.ExitStack() as hooks:
            for number in own:
                groups = slice(*structure.group_offsets[number : number + 2])
                experts = model.get_submodule(structure.blocks[number].matrices[0].module)
                add = partial(add_routing, output[groups], tokens[groups])
                hooks.enter_context(experts.register_forward_hook(add))
            for batch, call in enumerate(calls):
                states[batch] = call[index].run(layer, states[batch])
        for number in own:
            if not tokens[slice(*structure.group_offsets[number : number + 2])].any():
                raise AdaPrunerError(
                    f"`trials` 0: what the router of a {structure.model_type} chooses is not seen, so its experts are"
                    " ranked by a search alone; leave `trials` out"
                )
        if progress:
            progress(1)
    if not output.isfinite().all():
        raise NonFiniteError("the outputs of experts are not finite on the calibration text: try `dtype` float32")
    return tokens.cpu(), (output / tokens.clamp_min(1)).cpu()


def add_routing(output: Tensor, tokens: Tensor, module: nn.Module, inputs: tuple[object, ...], *_: object) -> None:
    """Adds router weight · ‖output‖ of every expert, and the number of its tokens. Each expert of a token is run again,
    because a module of experts returns only the sum of their outputs.

    Args:
        output, tokens: [experts], float32.
        module: the experts.
        inputs: the arguments of their call.
    """
    if not (choices := list(_choices(inputs))):
        return
    state, number, weight = map(torch.cat, zip(*choices, strict=True))
    with torch.no_grad():
        alone = module.forward(state, number, torch.ones_like(weight)).norm(dim=-1)
        sent = one_hot(number.flatten(), len(output))
        output += (sent.T @ (alone * weight.flatten()).float()).to(output.device)
        tokens += sent.sum(0).to(tokens.device)


def _choices(inputs: tuple[Any, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """[tokens, hidden], [tokens, 1] and [tokens, 1]: the hidden states that experts are called with, an expert of each
    token and its weight; once for every expert of a token. Nothing if the arguments are not hidden states, numbers of
    experts and weights, the last two [tokens, experts per token]."""
    if len(inputs) != 3 or inputs[1].is_floating_point() or inputs[1].shape != inputs[2].shape:
        return
    state, chosen, weights = (tensor.detach() for tensor in inputs)
    for number, weight in zip(chosen.split(1, 1), weights.split(1, 1), strict=True):
        yield state, number, weight


def expert_inputs(block: Block, module: nn.Module, inputs: tuple[object, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """The inputs of the down projections of experts, times the weight of the router: the outputs are linear in them.
    The experts of each token are run again, one after the other, with identities as down projections.

    Args:
        block: of channels inside experts.
        module: the experts.
        inputs: the arguments of their call.

    Yields:
        [tokens], int64, an expert of each token, and [tokens, channels], float32.
    """
    computing = {matrix.parameter.rpartition(".")[2] for matrix in block.slices}
    down = module.get_parameter(block.row_wise.parameter.rpartition(".")[2])
    outputs, channels = block.row_wise.as_projections(down).shape[1:]
    others = {
        parameter: torch.zeros_like(parameter)
        for name, parameter in module.named_parameters(recurse=False)
        if name not in computing
    }
    with torch.no_grad():
        for state, number, weight in _choices(inputs):
            read = []
            for first in range(0, channels, outputs):
                identity = torch.eye(outputs, channels - first, dtype=down.dtype, device=down.device)
                identity = torch.nn.functional.pad(identity, (first, 0)).expand(block.experts, outputs, channels)
                with _values({down: block.row_wise.as_stored(identity), **others}):
                    read.append(module.forward(state, number, weight)[:, : channels - first])
            yield number.flatten(), torch.cat(read, 1).float()


@contextlib.contextmanager
def _values(values: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """While it lasts, parameters have other values."""
    before = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in before.items():
            parameter.data = value


def one_hot(number: Tensor, experts: int) -> Tensor:
    """[tokens, experts], float32, to sum by matrix products: `index_add_` is nondeterministic on GPUs."""
    return torch.nn.functional.one_hot(number, experts).float()
