"""How many groups each block keeps, so that a ratio of all parameters goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapruner.errors import AdaPrunerError
from adapruner.structure import Block, Structure

RATIO_TOLERANCE = 0.005


@dataclass(frozen=True)
class Budget:
    """What is to be removed and where.

    Attributes:
        ratio: share of all parameters to remove, embeddings counted, tied ones once.
        protect_first: layers at the input that stay whole.
        protect_last: layers at the output that stay whole.
        head_share: share of heads removed, relative to the share of channels removed; 0 leaves attention whole, 1 is
            the equal shares of LLM-Pruner (arXiv 2305.11627) and the paper.
        round_to: kept feed-forward widths are multiples of this.
    """

    ratio: float
    protect_first: int = 4
    protect_last: int = 3
    head_share: float = 0.0
    round_to: int = 1


def kept_counts(structure: Structure, budget: Budget) -> list[int]:
    """How many groups each block keeps, in the order of `structure.blocks`.

    Every unprotected layer gives up the same share of its heads and of its channels. What one layer cannot give up
    exactly, because only whole steps can go, is made up by the following ones.

    Raises:
        AdaPrunerError: the ratio cannot be reached, or not within 0.5 points; with the arithmetic.
    """
    unprotected = range(budget.protect_first, structure.layers - budget.protect_last)
    if not unprotected:
        raise AdaPrunerError(
            f"all {structure.layers} layers are protected ({budget.protect_first} first, {budget.protect_last} last);"
            " lower --protect-first or --protect-last"
        )
    kept = {index: block.groups for index, block in enumerate(structure.blocks)}
    blocks = {index: block for index, block in enumerate(structure.blocks) if block.layer in unprotected}
    heads = {index: block for index, block in blocks.items() if block.kind == "heads"}
    channels = {index: block for index, block in blocks.items() if block.kind == "channels"}
    target = budget.ratio * structure.total_parameters

    prunable_heads, prunable_channels = _parameters(heads.values()), _parameters(channels.values())
    share = min(1.0, target / (budget.head_share * prunable_heads + prunable_channels))
    kept |= _keep_share(heads, 1 - budget.head_share * share, step=1)
    target -= sum((block.groups - kept[index]) * block.parameters_per_group for index, block in heads.items())
    kept |= _keep_share(channels, 1 - target / prunable_channels, step=budget.round_to)

    counts = [kept[index] for index in range(len(structure.blocks))]
    _refuse_missed_ratio(structure, budget, heads, channels, counts)
    return counts


def removed_parameters(structure: Structure, counts: Sequence[int]) -> int:
    """Parameters that go when every block keeps the given number of groups."""
    return sum(
        (block.groups - count) * block.parameters_per_group
        for block, count in zip(structure.blocks, counts, strict=True)
    )


def _parameters(blocks: Iterable[Block]) -> int:
    return sum(block.groups * block.parameters_per_group for block in blocks)


def _keep_share(blocks: dict[int, Block], share: float, step: int) -> dict[int, int]:
    """Counts near `share` of each block's groups, in whole steps, with the rounding carried over."""
    counts: dict[int, int] = {}
    wanted, given = 0.0, 0
    for index, block in blocks.items():
        unit = step * block.strata
        wanted += share * block.groups
        count = unit * round((wanted - given) / unit)
        counts[index] = min(max(count, unit), block.groups)
        given += counts[index]
    return counts


def _refuse_missed_ratio(
    structure: Structure,
    budget: Budget,
    heads: dict[int, Block],
    channels: dict[int, Block],
    counts: Sequence[int],
) -> None:
    total = structure.total_parameters
    reached = removed_parameters(structure, counts) / total
    if abs(reached - budget.ratio) <= RATIO_TOLERANCE:
        return

    def largest(head_share: float) -> float:
        """The share of all parameters that goes when every channel but the last step does, rounded down."""
        kept = _keep_share(heads, 1 - head_share, step=1) | _keep_share(channels, 0, budget.round_to)
        blocks = heads | channels
        removed = sum((blocks[index].groups - kept[index]) * blocks[index].parameters_per_group for index in kept)
        return math.floor(1000 * removed / total) / 1000

    if largest(budget.head_share) < budget.ratio:
        more = f", {largest(1):.3f} with equal shares (--head-share 1)" if budget.head_share < 1 else ""
        raise AdaPrunerError(
            f"a ratio of {budget.ratio:g} cannot be reached: with the first {budget.protect_first} and the last"
            f" {budget.protect_last} of {structure.layers} layers protected, at most {largest(budget.head_share):.3f}"
            f" of the {total:,} parameters can go{more}"
        )
    raise AdaPrunerError(
        f"a ratio of {budget.ratio:g} is not met: whole heads and steps of {budget.round_to} channels come to"
        f" {reached:.4f}, more than {RATIO_TOLERANCE} off; lower --round-to or --head-share"
    )
