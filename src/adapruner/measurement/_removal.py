"""The cost of removing each group, from second moments and weights alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.errors import AdaPrunerError
from adapruner.measurement._moments import InputMoments, factorize, scaled_factor
from adapruner.measurement._reduction import row_wise_weights
from adapruner.models._layers import loaded_layer
from adapruner.structure._blocks import Structure

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
        to that error when groups are removed one after the other, the cheapest first, made ascending in this order; and
        `conditional_variance`, the squared part of the inputs of a group that the others do not explain, per token, one
        group after the other, the smallest first. The terms in `importance` have the formulas and sources.

    Raises:
        AdaPrunerError: an error is not finite.
    """
    errors = []
    # Each layer is loaded once for all of its blocks.
    for layer, numbered_blocks in groupby(enumerate(structure.blocks), key=lambda numbered: numbered[1].layer):
        with loaded_layer(model, layer):
            for index, block in numbered_blocks:
                block_moments = moments.get(index)
                if block_moments is None:
                    errors.append(torch.zeros(2 + variance, block.groups))
                    continue
                for weight, expert_moments in zip(
                    row_wise_weights(model, block).float(), block_moments.of_experts(), strict=True
                ):
                    errors.append(_errors_of_groups(weight, expert_moments, block.row_wise.width, variance).cpu())
                if progress:
                    progress(1)
    by_group = torch.cat(errors, dim=1)
    if not by_group.isfinite().all():
        raise AdaPrunerError("errors of removal are not finite: try `dtype` float32, or more `compensation_windows`")
    names = ("removal_error", "elimination_error", "conditional_variance")
    return dict(zip(names[: len(by_group)], by_group, strict=True))


def _errors_of_groups(weight: Tensor, moments: InputMoments, width: int, variance: bool) -> Tensor:
    """[2 or 3, groups], float32, of one projection: see `removal_errors`."""
    # For the conditional variance, the projection of each group is the identity.
    identity = torch.eye(width, device=weight.device).repeat(1, weight.shape[1] // width)
    both, inverse = _with_inverse(torch.cat([weight, identity]), moments)
    weight, identity = both.split([len(weight), width])
    errors = [*_eliminate(weight, inverse, width)]
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
