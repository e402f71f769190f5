"""The cost of removing each group, from second moments and weights alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.errors import AdaPrunerError
from adapruner.measurement._moments import InputMoments
from adapruner.measurement._reduction import row_wise_weights
from adapruner.measurement._solving import factorize, scaled_factor
from adapruner.models import loaded_layer
from adapruner.structure import Structure

_ELIMINATION_STEPS = 64
# The least share of an input that those before it do not say, with which float32 inverses are near enough.
_LEAST_PIVOT = 1e-3


def removal_errors(
    model: PreTrainedModel,
    structure: Structure,
    moments: Mapping[int, InputMoments],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The error of a block after the removal of each of its groups and least-squares compensation.

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
                if of_block is None:
                    errors.append(torch.zeros(3, block.groups))
                    continue
                of_experts = zip(row_wise_weights(model, block).float(), of_block.of_experts(), strict=True)
                errors += [_errors_of_groups(*of_expert, block.row_wise.width).cpu() for of_expert in of_experts]
                if progress:
                    progress(1)
    found = torch.cat(errors, dim=1)
    if not found.isfinite().all():
        raise AdaPrunerError("errors of removal are not finite: try `dtype` float32, or more `compensation_windows`")
    return dict(zip(("removal_error", "elimination_error", "conditional_variance"), found, strict=True))


def _errors_of_groups(weight: Tensor, moments: InputMoments, width: int) -> Tensor:
    """[3, groups], float32, of one projection: see `removal_errors`."""
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
    factor, scale = scaled_factor(second, moments.damping)
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
        takes_over: kept weights compensate for the removed ones.
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
