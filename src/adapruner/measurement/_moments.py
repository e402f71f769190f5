"""Second moments of the inputs of the row-wise projections: what compensation and the reconstruction terms need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapruner.errors import AdaPrunerError, NonFiniteError
from adapruner.measurement._reduction import expert_inputs, projection, row_wise_weights
from adapruner.models import enter_layers, loaded_layer
from adapruner.structure import Block, Structure

# Of so many batches, one is held out while the damping is chosen.
_BATCHES_PER_HELD_OUT = 8
_ELIMINATION_STEPS = 64
# The least share of an input that those before it do not say, with which float32 inverses are near enough.
_LEAST_PIVOT = 1e-3
_STRIPS = 8
_OUTPUTS_TO_DAMP_BY = 1024
# What most norms add to the mean square.
_NORM_EPSILON = 1e-6
# Tried as multiples of the mean of the diagonal.
_DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class InputMoments:
    """Moments of the inputs x of one row-wise projection over the tokens of a text; or of the projections of all
    experts, where x is zero for the tokens that are not sent to an expert, and else includes the weight of the router.

    Where a norm follows the projection (Gemma 2 and 3, OLMo 2), the expectations weight each token by the inverse mean
    square of what the projection puts out: the norm divides all that goes wrong there by its root. Not so for experts.

    Attributes:
        mean: [inputs], float32, E[x].
        second: [inputs, inputs], float32, H = E[x xᵀ]; of experts, [experts, inputs of one, inputs of one].
        damping: what is added to the diagonal of H before it is inverted, chosen on tokens that were held out.
    """

    mean: Tensor
    second: Tensor
    damping: float

    def of_experts(self) -> list[InputMoments]:
        """Those of each expert; one where there are no experts."""
        if self.second.dim() == 2:
            return [self]
        means = self.mean.view(len(self.second), -1)
        return [InputMoments(mean, own, self.damping) for mean, own in zip(means, self.second, strict=True)]

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        save_file({"mean": self.mean, "second": self.second, "damping": torch.tensor(self.damping)}, path)

    @staticmethod
    def load(path: Path) -> InputMoments:
        """Reads a file written by `save`."""
        tensors = load_file(path)
        return InputMoments(tensors["mean"], tensors["second"], float(tensors["damping"]))


class StoredMoments(Mapping[int, InputMoments]):
    """Moments by number of the block, each in a file of its own, read when it is asked for: those of a 7B model are
    18 GB, those of its largest block 0.5 GB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, block: int) -> Path:
        """The file of a block, whether or not it is there."""
        return self.folder / f"{block:04}.safetensors"

    def __getitem__(self, block: int) -> InputMoments:
        if not self.path(block).is_file():
            raise KeyError(block)
        return InputMoments.load(self.path(block))

    def __iter__(self) -> Iterator[int]:
        return (int(path.stem) for path in sorted(self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class HeldMoments(Mapping[int, InputMoments]):
    """Stored moments that stay in memory once they were read, where there is room: trials ask for them again and again.

    Args:
        room: bytes that they may take on each device; those first are preferred. What has no room is read every time.
    """

    def __init__(self, stored: StoredMoments, room: Mapping[torch.device, int]) -> None:
        self._stored, self._room = stored, dict(room)
        self._held: dict[int, InputMoments] = {}

    def __getitem__(self, block: int) -> InputMoments:
        if block in self._held:
            return self._held[block]
        read = self._stored[block]
        size = read.mean.nbytes + read.second.nbytes
        for device, left in self._room.items():
            if size <= left:
                self._room[device] -= size
                held = replace(read, mean=read.mean.to(device), second=read.second.to(device))
                return self._held.setdefault(block, held)
        return read

    def __iter__(self) -> Iterator[int]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def factorize(second: Tensor, damping: float) -> Tensor:
    """[inputs, inputs], float64: the Cholesky factor of H + damping · I.

    Where rounding in H leaves that not positive definite, with ten times the damping, as often as it takes. In float64,
    because the few inputs that are huge in most language models leave float32 no digits for the others.

    Raises:
        AdaPrunerError: H is not finite.
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

    In float32 after every input was scaled to a unit moment, which leaves the huge ones and the others alike their
    digits; in float64 where rounding does not even then leave it positive definite.

    Raises:
        AdaPrunerError: H is not finite.
    """
    factor, scale = _scaled_factor(second, damping)
    if factor is None:
        return torch.cholesky_solve(right.double(), factorize(second, damping)).float()
    return torch.cholesky_solve((right * scale[:, None]).float(), factor) * scale[:, None]


def _scaled_factor(second: Tensor, damping: float) -> tuple[Tensor | None, Tensor]:
    """The Cholesky factor of H + damping · I, float32, after every input was divided by the root of its moment, and
    that divisor's inverse, [inputs]. No factor where rounding leaves that not positive definite."""
    damping = max(damping, torch.finfo(torch.float32).tiny)
    scale = (second.diagonal() + damping).rsqrt()
    scaled = (second * scale).mul_(scale[:, None]).float()
    scaled.fill_diagonal_(1.0)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    return (None if failed else factor), scale


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
        blocks: numbers of the blocks in `structure.blocks`; by default all that a projection reads.
        progress: called with 1 after every layer.

    Raises:
        AdaPrunerError: there are less than two windows.
        NonFiniteError: activations are not finite.
    """
    if len(windows) < 2:
        raise AdaPrunerError(f"second moments need at least 2 windows of text, not {len(windows)}")
    batches = windows.split(min(batch_size, max(1, len(windows) // _BATCHES_PER_HELD_OUT)))
    wanted = set(projected_blocks(structure) if blocks is None else blocks)
    with torch.inference_mode():
        states, calls = map(list, zip(*enter_layers(model, batches), strict=True))
    # One batch of eight; the last where there are less.
    held_out = range(_BATCHES_PER_HELD_OUT - 1, len(batches), _BATCHES_PER_HELD_OUT) or [len(batches) - 1]
    fitted = [number for number in range(len(batches)) if number not in held_out]
    for index in range(structure.layers):
        numbers = [number for number in sorted(wanted) if structure.blocks[number].layer == index]
        if any(structure.blocks[number].layer >= index for number in wanted):
            with torch.inference_mode(), loaded_layer(model, index) as layer:
                of_layer = [structure.blocks[number] for number in numbers]
                sums: list[list[_Sums]] = []
                for part in (fitted, held_out):
                    with _summing(model, of_layer) as sums_of_part:
                        for number in part:
                            states[number] = calls[number][index].run(layer, states[number])
                    sums.append(sums_of_part)
                moments = [
                    _choose_damping(row_wise_weights(model, block), of_fitted, of_held_out, block)
                    for block, of_fitted, of_held_out in zip(of_layer, *sums, strict=True)
                ]
            yield from zip(numbers, moments, strict=True)
        if progress:
            progress(1)


def projected_blocks(structure: Structure) -> list[int]:
    """The numbers of the blocks that have second moments: those that one projection reads."""
    return [number for number, block in enumerate(structure.blocks) if block.is_projected]


class _Sums:
    """Of the inputs of the projections of a block, [experts, inputs] and [experts, inputs, inputs], one expert where
    there are none; and the number of tokens, or the sum of their weights (see `InputMoments`)."""

    def __init__(self, block: Block, device: torch.device) -> None:
        self.tokens: int | Tensor = 0
        self._block = block
        experts, width = block.experts or 1, block.inputs_of_one
        self.first = torch.zeros(experts, width, device=device)
        self.second = torch.zeros(experts, width, width, device=device)

    def watch(self, model: PreTrainedModel) -> Any:
        """A handle of the hook that adds what the projections read."""
        if self._block.experts:
            return model.get_submodule(self._block.row_wise.module).register_forward_hook(self._add_of_experts)
        return projection(model, self._block.row_wise).register_forward_hook(self._add_input)

    def _add_input(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].flatten(0, -2).float()
        if not self._block.is_normalized:
            self.tokens += len(x)
            self._add(0, x)
            return
        weights = (output.flatten(0, -2).float().square().mean(1) + _NORM_EPSILON).reciprocal()
        self.tokens += weights.sum()
        self.first[0] += weights @ x
        add_products(self.second[0], x * weights.sqrt()[:, None])

    def _add_of_experts(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.tokens += len(output)
        for number, read in expert_inputs(self._block, module, inputs):
            for expert in number.unique().tolist():
                self._add(expert, read[number == expert])

    def _add(self, expert: int, x: Tensor) -> None:
        self.first[expert] += x.sum(0)
        add_products(self.second[expert], x)

    def symmetric(self) -> Tensor:
        """[experts, inputs, inputs]: the sum of x xᵀ."""
        return symmetric(self.second)


def add_products(second: Tensor, x: Tensor) -> None:
    """Adds the sum of x xᵀ to the upper triangle, in place: nearly half of the work of both (see `symmetric`).

    Args:
        second: [inputs, inputs], float32. A strip of the lower triangle beside the diagonal is written too.
        x: [tokens, inputs], float32.
    """
    for strip in torch.arange(x.shape[1]).tensor_split(_STRIPS):
        if len(strip):
            start, stop = int(strip[0]), int(strip[-1]) + 1
            second[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def symmetric(upper: Tensor) -> Tensor:
    """[…, inputs, inputs]: with the upper triangle in place of the lower, too."""
    return upper.triu().add_(upper.triu(1).mT)


@contextlib.contextmanager
def _summing(model: PreTrainedModel, blocks: Sequence[Block]) -> Iterator[list[_Sums]]:
    """While it lasts, the inputs of the row-wise projections of some blocks are summed up."""
    sums = [_Sums(block, model.get_parameter(block.row_wise.parameter).device) for block in blocks]
    with contextlib.ExitStack() as hooks:
        for of_block in sums:
            hooks.enter_context(of_block.watch(model))
        yield sums


def _choose_damping(weights: Tensor, fitted: _Sums, held_out: _Sums, block: Block) -> InputMoments:
    """The damping with which least squares, fitted on most of the tokens, errs least on the others when the half of the
    inputs that matter least is removed; one for all experts."""
    second = fitted.symmetric().div_(fitted.tokens)
    second_held_out = held_out.symmetric().div_(held_out.tokens)
    if not (second.isfinite().all() and second_held_out.isfinite().all()):
        raise NonFiniteError(
            f"the inputs of {block.row_wise.parameter} are not finite on the calibration text; the model has broken"
            " weights or its dtype is too narrow: try `dtype` float32"
        )
    scale = float(second.diagonal(dim1=1, dim2=2).mean()) or 1.0
    # Some of the outputs tell which damping is best as well as all of them.
    weights = weights[:, :: -(-weights.shape[1] // _OUTPUTS_TO_DAMP_BY)]
    dampings = [relative * scale for relative in _DAMPINGS]
    of_experts = zip(weights, second, second_held_out, strict=True)
    errors = torch.stack([_held_out_errors(*of_expert, dampings) for of_expert in of_experts]).sum(0)
    total = fitted.tokens + held_out.tokens
    merged = (second * fitted.tokens).add_(second_held_out * held_out.tokens).div_(total)
    mean = ((fitted.first + held_out.first) / total).flatten()
    return InputMoments(mean.cpu(), (merged if block.experts else merged[0]).cpu(), dampings[int(errors.argmin())])


def _held_out_errors(weight: Tensor, second: Tensor, held_out: Tensor, dampings: Sequence[float]) -> Tensor:
    """[dampings], float64: the error on the held-out tokens with each damping, but for a constant."""
    weight = weight.float()
    ranked = (weight.square().sum(0) * second.diagonal()).argsort(descending=True, stable=True)
    kept, removed = ranked.tensor_split([(len(ranked) + 1) // 2])
    gone = weight[:, removed].T
    within, across = second[kept][:, kept], second[kept][:, removed] @ gone
    within_held_out, across_held_out = held_out[kept][:, kept], held_out[kept][:, removed] @ gone
    errors = []
    for damping in dampings:
        moved = solve_damped(within, damping, across)
        # What the removed inputs leave by themselves is the same for all.
        errors.append((moved * (within_held_out @ moved - 2 * across_held_out)).sum(dtype=torch.float64))
    return torch.stack(errors)


def removal_errors(
    model: PreTrainedModel,
    structure: Structure,
    moments: Mapping[int, InputMoments],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """What the removal of each group costs its block after least-squares compensation.

    Args:
        progress: called with 1 after every block.

    Returns:
        By the name in `Statistics`, [groups], float32; zeros for blocks without moments.

        - `removal_error`: of the output of the block, squared, per token, if the group is removed alone:
          tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ), for a channel ‖W_c‖² / [H⁻¹]_cc (optimal brain surgeon, Hassibi and Stork 1992;
          blocks as in arXiv 2203.07259).
        - `elimination_error`: what the group adds to that when the groups go one after the other, the cheapest first,
          with the rest compensated each time (ZipLM, arXiv 2302.04089); made ascending in the order of elimination.
        - `conditional_variance`: tr(([H⁻¹]_gg)⁻¹), for a channel 1 / [H⁻¹]_cc, what the others do not say of the inputs
          of a group, squared, per token; one group after the other, the least first. The first to go is the one of
          least ridge leverage (MoDeGPT, arXiv 2408.09632).

    Raises:
        AdaPrunerError: an error is not finite.
    """
    errors = []
    # Each layer is loaded once for all of its blocks.
    for layer, of_layer in groupby(enumerate(structure.blocks), key=lambda numbered: numbered[1].layer):
        with loaded_layer(model, layer):
            for index, block in of_layer:
                of_block = moments.get(index)
                errors.append(_removal_errors_of(model, block, of_block))
                if progress and of_block:
                    progress(1)
    found = torch.cat(errors, dim=1)
    if not found.isfinite().all():
        raise AdaPrunerError("errors of removal are not finite: try `dtype` float32, or more `compensation_windows`")
    return dict(zip(("removal_error", "elimination_error", "conditional_variance"), found, strict=True))


def _removal_errors_of(model: PreTrainedModel, block: Block, moments: InputMoments | None) -> Tensor:
    """[3, groups of the block], float32, on the CPU: see `removal_errors`."""
    if moments is None:
        return torch.zeros(3, block.groups)
    of_experts = zip(row_wise_weights(model, block).float(), moments.of_experts(), strict=True)
    errors = [_removal_errors_of_expert(*of_expert, block.row_wise.width) for of_expert in of_experts]
    return torch.cat(errors, dim=1).cpu()


def _removal_errors_of_expert(weight: Tensor, moments: InputMoments, width: int) -> Tensor:
    """[3, groups], float32."""
    # For each group, as if the projection gave out its inputs as they are.
    same = torch.eye(width, device=weight.device).repeat(1, weight.shape[1] // width)
    both, inverse = _with_inverse(torch.cat([weight, same]), moments)
    weight, same = both.split([len(weight), width])
    alone, eliminated = _eliminate(weight, inverse, width)
    _, unexplained = _eliminate(same, inverse, width, takes_over=False)
    return torch.stack([alone, eliminated, unexplained]).float()


def _with_inverse(weight: Tensor, moments: InputMoments) -> tuple[Tensor, Tensor]:
    """[outputs, inputs], what a projection does with inputs that are scaled to a unit moment, and [inputs, inputs], the
    inverse of their damped second moments. Scaled, float32 ranks groups as float64 does; float64 where an input is
    nearly what others say of it."""
    second = moments.second.to(weight.device)
    factor, scale = _scaled_factor(second, moments.damping)
    if factor is None or factor.diagonal().min() ** 2 < _LEAST_PIVOT:
        return weight.double(), torch.cholesky_inverse(factorize(second, moments.damping))
    return weight / scale, torch.cholesky_inverse(factor)


def _errors(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """[groups]: tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ)."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    groups = len(inverse) // width
    own = torch.arange(groups, device=inverse.device)
    diagonal_blocks = inverse.view(groups, width, groups, width)[own, :, own]
    columns = weight.T.reshape(groups, width, len(weight))
    errors: Tensor = (torch.linalg.solve_ex(diagonal_blocks, columns).result * columns).sum((1, 2))
    return errors


def _eliminate(weight: Tensor, inverse: Tensor, width: int, takes_over: bool = True) -> tuple[Tensor, Tensor]:
    """[groups], twice: the error of each group alone, and what it adds in the order of elimination. Several channels go
    at a time, so that the matrix products are worth it.

    Args:
        takes_over: whether kept weights take over from those that are gone.
    """
    groups = len(inverse) // width
    scores = weight.new_empty(groups)
    at_a_time = max(1, groups // _ELIMINATION_STEPS)
    left = torch.arange(groups, device=weight.device)
    offsets = torch.arange(width, device=weight.device)
    highest = weight.new_zeros(())
    alone = errors = _errors(weight, inverse, width)
    while len(left):
        ranked = errors.argsort(stable=True)
        gone, stay = ranked[:at_a_time], ranked[at_a_time:].sort().values
        ascending = errors[gone].clamp_min(highest)
        # Ascending in steps that a float32 can tell apart, so that the order is not lost where errors are alike.
        ascending = ascending * (1 + 1e-6 * torch.arange(1, len(gone) + 1, device=weight.device))
        scores[left[gone]] = ascending
        highest = ascending[-1]
        gone, stay = ((part[:, None] * width + offsets).flatten() for part in (gone, stay))
        of_gone = inverse.index_select(0, gone)
        across = of_gone.index_select(1, stay)
        # A GPU would have to wait for the check of `solve`; a positive definite matrix has a solution.
        factor = torch.linalg.solve_ex(of_gone.index_select(1, gone), across).result
        left_over = weight.index_select(1, stay)
        weight = left_over.addmm_(weight.index_select(1, gone), factor, alpha=-1) if takes_over else left_over
        inverse = inverse.index_select(0, stay).index_select(1, stay).addmm_(across.T, factor, alpha=-1)
        left = left[ranked[at_a_time:].sort().values]
        errors = _errors(weight, inverse, width)
    return alone, scores
