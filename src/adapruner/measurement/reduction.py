"""Hooks that reduce activations and gradients to numbers per vector and per input as soon as they exist."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapruner.measurement.routing import add_routing, expert_inputs, one_hot
from adapruner.structure.blocks import Block, Structure, TensorSlice


class Reduction:
    """The sums of one batch over the tokens of each sample, by their name in `Statistics`; float32, on the first device
    of the model, because copying each of them to the CPU would stall it.

    Attributes:
        sums: [samples, vectors], [samples, inputs] or [samples, groups]; `routed_output` and `routed_share` are
            for models with experts alone.
    """

    def __init__(self, structure: Structure, samples: int, device: torch.device) -> None:
        self._structure = structure
        vectors, inputs = len(structure.group_of_vector), len(structure.group_of_input)
        sizes = dict.fromkeys(("taylor", "element_absolute", "element_squared"), vectors)
        sizes |= {"input_mean": inputs, "input_squared": inputs}
        if structure.has_experts:
            sizes |= dict.fromkeys(("routed_output", "routed_share"), structure.group_offsets[-1])
        self.sums = {name: torch.zeros(samples, size, device=device) for name, size in sizes.items()}
        projected = [block for block in structure.blocks if block.is_projected and not block.experts]
        elements = (matrix.elements * matrix.width * block.groups for block in projected for matrix in block.matrices)
        self._largest = max(elements, default=0)
        self._working: dict[torch.device, Tensor] = {}
        counts = (block.groups * sum(matrix.width for matrix in block.matrices) for block in structure.blocks)
        self._first_vectors = list(accumulate(counts, initial=0))
        self._first_inputs = list(accumulate((block.inputs for block in structure.blocks), initial=0))

    @contextlib.contextmanager
    def watching(self, model: PreTrainedModel, blocks: Iterable[int]) -> Iterator[None]:
        """While it lasts, the blocks of these numbers are reduced as the model runs forward and backward through them;
        their weights are in memory."""
        with contextlib.ExitStack() as hooks:
            for index in blocks:
                block = self._structure.blocks[index]
                make = self._expert_hooks if block.experts or not block.is_projected else self._hooks
                for hook in make(model, block, index):
                    hooks.enter_context(hook)
            yield

    def _vectors(self, block: Block, index: int) -> list[tuple[TensorSlice, slice]]:
        """The matrices of a block, each with the numbers of its vectors."""
        counts = (block.groups * matrix.width for matrix in block.matrices)
        bounds = pairwise(accumulate(counts, initial=self._first_vectors[index]))
        return [(matrix, slice(*ends)) for matrix, ends in zip(block.matrices, bounds, strict=True)]

    def _input_sums(self, index: int) -> tuple[Tensor, Tensor]:
        """[samples, inputs of a block], twice: the sums of its inputs and of their squares."""
        inputs = slice(*self._first_inputs[index : index + 2])
        return self.sums["input_mean"][:, inputs], self.sums["input_squared"][:, inputs]

    def _hooks(self, model: PreTrainedModel, block: Block, index: int) -> Iterator[Any]:
        for matrix, vectors in self._vectors(block, index):
            end = matrix.offset + block.groups * matrix.width
            rows = slice(matrix.offset, end) if matrix.axis == 0 else slice(None)
            names = "taylor", "element_absolute", "element_squared"
            taylor, absolute, squared = (self.sums[name][:, vectors] for name in names)
            hook = _element_wise(matrix, rows, taylor, absolute, squared, self._two_stacks)
            yield model.get_submodule(matrix.module).register_forward_hook(hook)
        reduce_inputs = partial(_reduce_inputs, *self._input_sums(index))
        yield model.get_submodule(block.row_wise.module).register_forward_pre_hook(reduce_inputs)

    def _expert_hooks(self, model: PreTrainedModel, block: Block, index: int) -> Iterator[Any]:
        """For experts, whose products hooks cannot see: gradients of whole parameters, each dropped as soon as it was
        reduced. Only for one sample at a time."""
        by_parameter = dict[str, list[tuple[TensorSlice, slice]]]()
        for matrix, vectors in self._vectors(block, index):
            by_parameter.setdefault(matrix.parameter, []).append((matrix, vectors))
        for name, matrices in by_parameter.items():
            yield model.get_parameter(name).register_post_accumulate_grad_hook(partial(self._reduce_gradient, matrices))
        experts = model.get_submodule(block.matrices[0].module)
        if block.experts:
            mean, squared = self._input_sums(index)
            yield experts.register_forward_hook(partial(_reduce_expert_inputs, block, mean[0], squared[0]))
        else:
            groups = slice(*self._structure.group_offsets[index : index + 2])
            output, share = self.sums["routed_output"][0, groups], self.sums["routed_share"][0, groups]
            yield experts.register_forward_hook(partial(_reduce_routing, output, share))

    def _reduce_gradient(self, matrices: list[tuple[TensorSlice, slice]], parameter: Tensor) -> None:
        products = cast(Tensor, parameter.grad).float() * parameter.detach()
        parameter.grad = None
        _reduce_products(self.sums["taylor"], matrices, products)
        _reduce_products(self.sums["element_absolute"], matrices, products.abs())
        _reduce_products(self.sums["element_squared"], matrices, products.square_())

    def _two_stacks(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two buffers, [matrices, ·, ·], float32, each with as many matrices of a shape as fit into the memory of the
        largest. Allocating them every time would cost more than the computation in them."""
        if like.device not in self._working:
            self._working[like.device] = torch.empty(2, self._largest, device=like.device)
        count = self._largest // like.numel()
        first, second = self._working[like.device][:, : count * like.numel()]
        return first.view(count, *like.shape), second.view(count, *like.shape)


def row_wise_weights(model: PreTrainedModel, block: Block) -> Tensor:
    """[experts, outputs, inputs]: the weights of the projections that read a block; a single entry without experts."""
    return block.row_wise.as_projections(model.get_parameter(block.row_wise.parameter).detach())


def _reduce_products(sums: Tensor, matrices: list[tuple[TensorSlice, slice]], products: Tensor) -> None:
    for matrix, vectors in matrices:
        if matrix.experts:
            by_expert = matrix.as_projections(products).sum(2 - matrix.axis)
            width = (vectors.stop - vectors.start) // matrix.experts
            sums[0, vectors] = by_expert[:, matrix.offset : matrix.offset + width].flatten()
        else:
            sums[0, vectors] = products.movedim(matrix.axis, 0).flatten(1).sum(1)


def _reduce_inputs(mean: Tensor, squared: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    x = inputs[0].detach().float().reshape(len(mean), -1, mean.shape[1])
    mean.copy_(x.mean(1))
    squared.copy_(x.square().mean(1))


def _reduce_routing(output: Tensor, share: Tensor, module: nn.Module, inputs: tuple[Any, ...], _: object) -> None:
    add_routing(output, share, module, inputs)
    for sums in (output, share):  # of one sample, on which the experts are called once
        sums /= len(inputs[0])


def _reduce_expert_inputs(
    block: Block, mean: Tensor, squared: Tensor, module: nn.Module, inputs: tuple[object, ...], _: object
) -> None:
    for number, read in expert_inputs(block, module, inputs):
        for sums, values in ((mean, read), (squared, read.square())):
            added = sums.to(read.device).view(block.experts, -1)  # no copy on the same device
            sums.copy_(added.addmm_(one_hot(number, block.experts).T / len(read), values).flatten())


_ForwardHook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]


def _element_wise(
    matrix: TensorSlice,
    rows: slice,
    taylor: Tensor,
    absolute: Tensor,
    squared: Tensor,
    two_stacks: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> _ForwardHook:
    """Keeps the input of the projection until the gradient of its output arrives, then computes the weight gradient of
    a few samples at a time and reduces it to rows or columns."""

    def after_forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        stored: Any = module.weight
        output.register_hook(partial(reduce, matrix.as_projections(stored)[0, rows], inputs[0].detach()))

    def reduce(weight: Tensor, projection_input: Tensor, output_gradient: Tensor) -> None:
        samples, summed_axis = len(taylor), 2 - matrix.axis
        x = projection_input.reshape(samples, -1, projection_input.shape[-1]).float()
        delta = output_gradient.reshape(samples, -1, output_gradient.shape[-1])[..., rows].float()
        stacks = two_stacks(weight)
        for start in range(0, samples, len(stacks[0])):
            chunk = slice(start, min(start + len(stacks[0]), samples))
            products, squares = (stack[: chunk.stop - start] for stack in stacks)
            torch.bmm(delta[chunk].transpose(1, 2), x[chunk], out=products)
            products.mul_(weight)
            taylor[chunk] = products.sum(summed_axis)
            squared[chunk] = torch.mul(products, products, out=squares).sum(summed_axis)
            absolute[chunk] = products.abs_().sum(summed_axis)

    return after_forward
