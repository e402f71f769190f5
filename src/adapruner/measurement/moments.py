"""Second moments of the inputs of the row-wise projections, equations with them, and the errors of removing groups.

They are the basis of compensation and of the reconstruction terms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from adapruner.base.errors import AdaPrunerError, NonFiniteError
from adapruner.measurement.reduction import row_wise_weights
from adapruner.measurement.routing import expert_inputs
from adapruner.model.layers import enter_layers, loaded_layer
from adapruner.structure.blocks import Block, Structure

# One batch of this many is held out to choose the damping.
_BATCHES_PER_HELD_OUT = 8
_OUTPUTS_TO_DAMP_BY = 1024
# Most norms add this to the mean square.
_NORM_EPSILON = 1e-6
# A triangle of second moments is summed in so many strips.
_STRIPS = 8
# Tried as multiples of the mean of the diagonal.
_DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class InputMoments:
    """Moments of the inputs x of one row-wise projection over the tokens of a text; or of the projections of all
    experts: there x includes the weight of the router, and is zero for tokens that are not sent to the expert.

    If a norm follows the projection (Gemma 2 and 3, OLMo 2), the expectations weight each token by the inverse mean
    square of the output of the projection, because the norm divides errors of the output by its root. Experts are
    exempt.

    Attributes:
        second: [inputs, inputs], float32, H = E[x xᵀ]; for experts, [experts, inputs of one, inputs of one].
        damping: added to the diagonal of H before it is inverted, chosen on held-out tokens.
    """

    second: Tensor
    damping: float

    def of_experts(self) -> list[InputMoments]:
        """The moments of each expert; a single entry without experts."""
        if self.second.dim() == 2:
            return [self]
        return [InputMoments(second, self.damping) for second in self.second]

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        save_file({"second": self.second, "damping": torch.tensor(self.damping)}, path)

    @staticmethod
    def load(path: Path) -> InputMoments:
        """Reads a file written by `save`."""
        tensors = load_file(path)
        return InputMoments(tensors["second"], float(tensors["damping"]))


class StoredMoments(Mapping[int, InputMoments]):
    """Moments by block number, one file for each block, read on access: those of a 7B model are 12 to 18 GB, those of
    its largest block 0.5 GB.

    Args:
        folder: of the files.
        room: bytes on each device for moments that are kept in memory once they were read; the first devices are
            preferred. By default, moments are read every time.
    """

    def __init__(self, folder: Path, room: Mapping[torch.device, int] | None = None) -> None:
        self.folder = folder
        self._room, self._held = dict(room or {}), dict[int, InputMoments]()

    def path(self, block: int) -> Path:
        """The file of a block; it need not exist."""
        return self.folder / f"{block:04}.safetensors"

    def __getitem__(self, block: int) -> InputMoments:
        if block in self._held:
            return self._held[block]
        if not self.path(block).is_file():
            raise KeyError(block)
        read = InputMoments.load(self.path(block))
        size = read.second.nbytes
        for device, left in self._room.items():
            if size <= left:
                self._room[device] -= size
                self._held[block] = replace(read, second=read.second.to(device))
                return self._held[block]
        return read

    def __iter__(self) -> Iterator[int]:
        return (int(path.stem) for path in sorted(self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def measure_moments(
    model: PreTrainedModel,
    structure: Structure,
    windows: Tensor,
    blocks: Collection[int] | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, InputMoments]]:
    """One forward pass over a text, layer by layer; yields the moments of each block with its number.

    Memory: the hidden state of all tokens, 8 bytes for each entry of H of one layer, and about 40 for each entry of one
    block while its damping is chosen.

    Args:
        windows: [windows, tokens], int64; at least two, one of which is held out to choose the damping.
        blocks: numbers of the blocks in `structure.blocks`; by default all blocks that are read by a projection.
        progress: called with 1 after every layer.
    """
    if len(windows) < 2:
        raise AdaPrunerError(f"second moments need at least 2 windows of text, not {len(windows)}")
    batches = windows.split(min(batch_size, max(1, len(windows) // _BATCHES_PER_HELD_OUT)))
    wanted = set(projected_blocks(structure) if blocks is None else blocks)
    with torch.inference_mode():
        states, calls = map(list, zip(*enter_layers(model, batches), strict=True))
    # One batch of eight; the last if there are fewer.
    held_out = range(_BATCHES_PER_HELD_OUT - 1, len(batches), _BATCHES_PER_HELD_OUT) or [len(batches) - 1]
    fitted = [number for number in range(len(batches)) if number not in held_out]
    for index in range(structure.layers):
        numbers = [number for number in sorted(wanted) if structure.blocks[number].layer == index]
        if any(structure.blocks[number].layer >= index for number in wanted):
            with torch.inference_mode(), loaded_layer(model, index) as layer:
                layer_blocks = [structure.blocks[number] for number in numbers]
                sums = []
                for batch_numbers in (fitted, held_out):
                    sums.append([_Sums(model, block) for block in layer_blocks])
                    with contextlib.ExitStack() as hooks:
                        for block_sums in sums[-1]:
                            hooks.enter_context(block_sums.watch(model))
                        for number in batch_numbers:
                            states[number] = calls[number][index].run(layer, states[number])
                moments = [
                    _choose_damping(row_wise_weights(model, block), fitted_sums, held_out_sums, block)
                    for block, fitted_sums, held_out_sums in zip(layer_blocks, *sums, strict=True)
                ]
            yield from zip(numbers, moments, strict=True)
        if progress:
            progress(1)


def projected_blocks(structure: Structure) -> list[int]:
    """The numbers of the blocks that have second moments: those that are read by one projection."""
    return [number for number, block in enumerate(structure.blocks) if block.is_projected]


class _Sums:
    """Second moments, not yet divided, of the inputs of the projections of a block: [experts, inputs, inputs], with one
    expert for blocks without; and the number of tokens, or the sum of their weights (see `InputMoments`)."""

    def __init__(self, model: PreTrainedModel, block: Block) -> None:
        self.tokens: int | Tensor = 0
        self._block = block
        experts, width = block.experts or 1, block.inputs_of_one
        device = model.get_parameter(block.row_wise.parameter).device
        self.second = torch.zeros(experts, width, width, device=device)

    def watch(self, model: PreTrainedModel) -> RemovableHandle:
        """A handle of the hook that adds the inputs of the projections."""
        add = self._add_of_experts if self._block.experts else self._add_input
        return model.get_submodule(self._block.row_wise.module).register_forward_hook(add)

    def _add_input(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].flatten(0, -2)
        if not self._block.is_normalized:
            self.tokens += len(x)
            add_products(self.second[0], x)
            return
        weights = (output.flatten(0, -2).float().square().mean(1) + _NORM_EPSILON).reciprocal()
        self.tokens += weights.sum()
        add_products(self.second[0], x * weights.sqrt()[:, None])

    def _add_of_experts(self, module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
        self.tokens += len(output)
        for number, read in expert_inputs(self._block, module, inputs):
            for expert in number.unique().tolist():
                add_products(self.second[expert], read[number == expert])


def _choose_damping(weights: Tensor, fitted: _Sums, held_out: _Sums, block: Block) -> InputMoments:
    """The moments, with the damping of the smallest held-out error: least squares is fitted on most of the tokens after
    the less important half of the inputs was removed, and evaluated on the others. One damping for all experts."""
    second = symmetric(fitted.second).div_(fitted.tokens)
    second_held_out = symmetric(held_out.second).div_(held_out.tokens)
    if not (second.isfinite().all() and second_held_out.isfinite().all()):
        raise NonFiniteError(
            f"the inputs of {block.row_wise.parameter} are not finite on the calibration text; the model has broken"
            " weights or its dtype is too narrow: try `dtype` float32"
        )
    scale = float(second.diagonal(dim1=1, dim2=2).mean()) or 1.0
    # A sample of the outputs suffices to choose the damping.
    weights = weights[:, :: -(-weights.shape[1] // _OUTPUTS_TO_DAMP_BY)]
    dampings = [relative * scale for relative in _DAMPINGS]
    by_expert = zip(weights, second, second_held_out, strict=True)
    errors = torch.stack([_held_out_errors(*tensors, dampings) for tensors in by_expert]).sum(0)
    total = fitted.tokens + held_out.tokens
    merged = (second * fitted.tokens).add_(second_held_out * held_out.tokens).div_(total)
    return InputMoments((merged if block.experts else merged[0]).cpu(), dampings[int(errors.argmin())])


def _held_out_errors(weight: Tensor, second: Tensor, held_out: Tensor, dampings: Sequence[float]) -> Tensor:
    """[dampings], float64: the error on the held-out tokens with each damping, up to a constant."""
    weight = weight.float()
    ranked = (weight.square().sum(0) * second.diagonal()).argsort(descending=True, stable=True)
    kept, removed = ranked.tensor_split([(len(ranked) + 1) // 2])
    removed_weight = weight[:, removed].T
    within, across = second[kept][:, kept], second[kept][:, removed] @ removed_weight
    within_held_out, across_held_out = held_out[kept][:, kept], held_out[kept][:, removed] @ removed_weight
    errors = []
    for damping in dampings:
        moved = solve_damped(within, damping, across)
        # The error of the removed inputs alone is the same for all dampings.
        errors.append((moved * (within_held_out @ moved - 2 * across_held_out)).sum(dtype=torch.float64))
    return torch.stack(errors)


def add_products(second: Tensor, x: Tensor) -> None:
    """Adds the sum of x xᵀ to the upper triangle, in place: nearly half the work of both triangles (see `symmetric`).

    Args:
        second: [inputs, inputs], float32. A strip of the lower triangle next to the diagonal is written too.
        x: [tokens, inputs], any dtype.
    """
    # Products of numbers that fit into bfloat16 are exact in its units, and in TF32; sums are in float32.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if x.dtype == torch.bfloat16 else before)
    x = x.float()
    try:
        for strip in torch.arange(x.shape[1]).tensor_split(_STRIPS):
            if len(strip):
                start, stop = int(strip[0]), int(strip[-1]) + 1
                second[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
    finally:
        torch.set_float32_matmul_precision(before)


def symmetric(upper: Tensor) -> Tensor:
    """[…, inputs, inputs]: the symmetric matrix with this upper triangle."""
    return upper.triu().add_(upper.triu(1).mT)


def factorize(second: Tensor, damping: float) -> Tensor:
    """[inputs, inputs], float64: the Cholesky factor of H + damping · I.

    If rounding in H makes that not positive definite, the damping is multiplied by ten until it is. In float64, because
    most language models have a few huge inputs, which leave float32 no digits for the others.
    """
    if not second.isfinite().all():
        raise AdaPrunerError("second moments of activations are not finite: try `dtype` float32")
    damping = max(damping, torch.finfo(torch.float32).tiny)
    while True:
        damped = second.to(torch.float64, copy=True)
        damped.diagonal().add_(damping)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
        damping *= 10


def solve_damped(second: Tensor, damping: float, right: Tensor) -> Tensor:
    """[inputs, columns], float32: the solution X of (H + damping · I) X = right.

    In float32 after every input was scaled to a unit moment, which keeps the digits of huge and of other inputs; in
    float64 if rounding makes even that not positive definite.
    """
    factor, scale = scaled_factor(second, damping)
    if factor is None:
        return torch.cholesky_solve(right.double(), factorize(second, damping)).float()
    return torch.cholesky_solve((right * scale[:, None]).float(), factor) * scale[:, None]


def scaled_factor(second: Tensor, damping: float) -> tuple[Tensor | None, Tensor]:
    """The Cholesky factor of H + damping · I, float32, after every input was divided by the root of its moment, and
    the inverse of that divisor, [inputs]. The factor is None if rounding makes the matrix not positive definite."""
    damping = max(damping, torch.finfo(torch.float32).tiny)
    scale = (second.diagonal() + damping).rsqrt()
    scaled = (second * scale).mul_(scale[:, None]).float()
    scaled.fill_diagonal_(1.0)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    return (None if failed else factor), scale


_ELIMINATION_STEPS = 64
# Minimum share of an input that is not explained by those before it, for which float32 inverses are precise enough.
_LEAST_PIVOT = 1e-3


def removal_errors(
    model: PreTrainedModel,
    structure: Structure,
    moments: Mapping[int, InputMoments],
    progress: Callable[[int], None] | None = None,
    variance: bool = True,
) -> dict[str, Tensor]:
    """The error of a block after the removal of each of its groups and least-squares compensation.

    Args:
        progress: called with 1 after every block.
        variance: False leaves out `conditional_variance`, which takes half of the time.

    Returns:
        By the name in `Statistics`, [groups], float32; zeros for blocks without moments: `removal_error`, of the output
        of the block, squared, per token, if the group is removed alone; `elimination_error`, the addition of the group
        to that error when groups are removed step by step, the cheapest first, made ascending in this order;
        `tempered_error`, its geometric mean with the squared inputs of the group, per token; and
        `conditional_variance`, the squared part of the inputs of a group that the others do not explain, per token,
        step by step, the smallest first. The terms in `importance` have the formulas and sources.
    """
    errors, measured = [], set(moments)
    # Each layer is loaded once for all of its blocks.
    for layer, numbered in groupby(enumerate(structure.blocks), key=lambda numbered: numbered[1].layer):
        blocks = dict(numbered)
        with loaded_layer(model, layer) if measured & blocks.keys() else contextlib.nullcontext():
            for index, block in blocks.items():
                if index not in measured:
                    errors.append(torch.zeros(3 + variance, block.groups))
                    continue
                block_moments = moments[index]
                for weight, expert_moments in zip(
                    row_wise_weights(model, block).float(), block_moments.of_experts(), strict=True
                ):
                    errors.append(_errors_of_groups(weight, expert_moments, block.row_wise.width, variance).cpu())
                if progress:
                    progress(1)
    by_group = torch.cat(errors, dim=1)
    if not by_group.isfinite().all():
        raise AdaPrunerError("errors of removal are not finite: try `dtype` float32, or more `compensation_windows`")
    names = ("removal_error", "elimination_error", "tempered_error", "conditional_variance")
    return dict(zip(names[: len(by_group)], by_group, strict=True))


def _errors_of_groups(weight: Tensor, moments: InputMoments, width: int, variance: bool) -> Tensor:
    """[3 or 4, groups], float32, of one projection: see `removal_errors`."""
    # For the conditional variance, the projection of each group is the identity.
    identity = torch.eye(width, device=weight.device).repeat(1, weight.shape[1] // width)
    both, inverse = _with_inverse(torch.cat([weight, identity]), moments)
    weight, identity = both.split([len(weight), width])
    alone, eliminated = _eliminate(weight, inverse, width)
    squared = moments.second.diagonal().to(eliminated).view(-1, width).sum(1)
    errors = [alone, eliminated, (eliminated * squared).sqrt()]
    if variance:
        errors.append(_eliminate(identity, inverse, width, takes_over=False)[1])
    return torch.stack(errors).float()


def _with_inverse(weight: Tensor, moments: InputMoments) -> tuple[Tensor, Tensor]:
    """[outputs, inputs], the weight for inputs that are scaled to a unit moment, and [inputs, inputs], the inverse of
    their damped second moments. After scaling, float32 ranks groups as float64 does; float64 if an input is nearly a
    linear combination of others."""
    second = moments.second.to(weight.device)
    factor, scale = scaled_factor(second, moments.damping)
    if factor is None or factor.diagonal().min() ** 2 < _LEAST_PIVOT:
        return weight.double(), torch.cholesky_inverse(factorize(second, moments.damping))
    return weight / scale, torch.cholesky_inverse(factor)


def _errors(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """[groups]: tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ)."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    groups = len(inverse) // width
    numbers = torch.arange(groups, device=inverse.device)
    diagonal_blocks = inverse.view(groups, width, groups, width)[numbers, :, numbers]
    columns = weight.T.reshape(groups, width, len(weight))
    errors: Tensor = (torch.linalg.solve_ex(diagonal_blocks, columns).result * columns).sum((1, 2))
    return errors


def _eliminate(weight: Tensor, inverse: Tensor, width: int, takes_over: bool = True) -> tuple[Tensor, Tensor]:
    """[groups], twice: the error of each group alone, and the error that it adds in the order of elimination. Several
    channels are removed at a time, for larger matrix products. If `takes_over`, kept weights compensate for them."""
    groups = len(inverse) // width
    scores = weight.new_empty(groups)
    at_a_time = max(1, groups // _ELIMINATION_STEPS)
    left = torch.arange(groups, device=weight.device)
    offsets = torch.arange(width, device=weight.device)
    highest = weight.new_zeros(())
    alone = errors = _errors(weight, inverse, width)
    while len(left):
        ranked = errors.argsort(stable=True)
        removed, kept = ranked[:at_a_time], ranked[at_a_time:].sort().values
        ascending = errors[removed].clamp_min(highest)
        # Steps that float32 can represent keep the order of groups whose errors are equal.
        ascending = ascending * (1 + 1e-6 * torch.arange(1, len(removed) + 1, device=weight.device))
        scores[left[removed]] = ascending
        highest = ascending[-1]
        left = left[kept]
        removed, kept = ((groups[:, None] * width + offsets).flatten() for groups in (removed, kept))
        removed_rows = inverse.index_select(0, removed)
        across = removed_rows.index_select(1, kept)
        # A GPU would have to wait for the check of `solve`; a positive definite matrix has a solution.
        factor = torch.linalg.solve_ex(removed_rows.index_select(1, removed), across).result
        kept_weight = weight.index_select(1, kept)
        weight = kept_weight.addmm_(weight.index_select(1, removed), factor, alpha=-1) if takes_over else kept_weight
        inverse = inverse.index_select(0, kept).index_select(1, kept).addmm_(across.T, factor, alpha=-1)
        errors = _errors(weight, inverse, width)
    return alone, scores
