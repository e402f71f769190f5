"""From an allocation to weights of blocks, and from weights and a ratio to the number of groups kept in each block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from adapruner.config import Layout, PruneConfig, RatioOf
from adapruner.errors import AdaPrunerError
from adapruner.structure._blocks import Block, Kind, Structure

RATIO_TOLERANCE = 0.005
# Removing more of the channels of a layer hurts more than removing heads or pruning more layers
# (research/experiments/allocation.md).
MOST_CHANNELS = 0.8
# Protected layers at both ends and share of heads, from the least harmful to the one that reaches the highest ratio.
_DEFAULT_ALLOCATIONS = ((4, 3, 0.0), (2, 2, 0.0), (1, 1, 0.0), (1, 1, 0.5), (2, 1, 1.0), (0, 0, 1.0))


class BudgetError(AdaPrunerError):
    """A budget that this model cannot meet with this allocation."""


class UnreachableRatioError(BudgetError):
    """The ratio is higher than the allocation allows."""


@dataclass(frozen=True)
class Profile:
    """Weights by depth: with z from -1 at the first unprotected layer to 1 at the last, exp(tilt · z - bend · z²).

    Attributes:
        protect_first: layers at the input that are kept whole.
        protect_last: layers at the output that are kept whole.
    """

    protect_first: int = 4
    protect_last: int = 3
    tilt: float = 0.0
    bend: float = 0.0

    def weights(self, layers: int) -> tuple[float, ...]:
        """The weight of every layer; 0 for protected layers."""
        first, count = self.protect_first, layers - self.protect_first - self.protect_last
        if count <= 0:
            raise UnreachableRatioError(
                f"all {layers} layers are protected ({self.protect_first} first, {self.protect_last} last); lower"
                " `protect_first` or `protect_last`"
            )
        depths = [2 * layer / max(1, count - 1) - 1 for layer in range(count)]
        unprotected = (math.exp(self.tilt * z - self.bend * z * z) for z in depths)
        return (0.0,) * first + tuple(unprotected) + (0.0,) * self.protect_last


@dataclass(frozen=True)
class LayerWeights:
    """Weights given layer by layer, of feed-forward channels, and of heads and channels inside experts; see
    `weigh_channels`."""

    channels: tuple[float, ...]
    others: tuple[float, ...]


# `uniform`: all layers keep the same number of heads and of channels, which any loader of the family supports.
Allocation: TypeAlias = Literal["uniform"] | LayerWeights | Profile


@dataclass(frozen=True)
class Budget:
    """The amount to remove, and its division among the blocks.

    The allocation gives every block a weight: groups are removed in proportion to it, and none if it is 0. The same
    number of whole experts is removed from all layers.

    Attributes:
        ratio: share of all parameters to remove, embeddings counted, tied ones once; see `ratio_of`.
        heads: share of heads removed, relative to the share of channels removed (0 leaves attention whole; 1 gives the
            equal shares of LLM-Pruner, arXiv 2305.11627, and of the paper); or for every layer the number of head
            groups that it keeps, for which channels make up.
        round_to: kept feed-forward widths are multiples of this.
        ratio_of: `groups` makes the ratio a share of the channels (and, times `heads`, of the heads) of a layer of
            weight 1, rounded in each layer, as in the protocol of LLM-Pruner.
        without_attention: layers whose attention is removed whole, protected or not.
    """

    ratio: float
    allocation: Allocation = Profile()
    heads: float | tuple[int, ...] = 0.0
    round_to: int = 1
    ratio_of: RatioOf = "parameters"
    without_attention: tuple[int, ...] = ()

    @property
    def head_share(self) -> float:
        """Share of heads removed, relative to channels; 0 if their number is given."""
        return 0.0 if isinstance(self.heads, tuple) else self.heads

    def given_count(self, block: Block) -> int | None:
        """Number of groups that a block keeps, if the budget fixes it; None if the weight of the block decides."""
        if block.kind != "heads":
            return None
        if block.layer in self.without_attention:
            return 0
        return self.heads[block.layer] if isinstance(self.heads, tuple) else None


def weigh_channels(structure: Structure, budget: Budget, shares: Sequence[float]) -> Budget:
    """The budget with channels removed in proportion to a share of each layer, protected or not.

    The weights of channels are as large together as before, so that heads keep their part.
    """
    others = _layer_weights(structure, budget.allocation).others
    layers = [block.layer for block in structure.blocks if _is_plain(block)]
    factor = math.fsum(others[layer] for layer in layers) / (math.fsum(shares[layer] for layer in layers) or 1.0)
    return replace(budget, allocation=LayerWeights(tuple(factor * share for share in shares), others))


def kept_counts(structure: Structure, budget: Budget) -> list[int]:
    """Number of groups that each block keeps, in the order of `structure.blocks`.

    Only whole steps can be removed. The rounding error of a layer is passed on to the following layers, and that of
    heads to the channels.

    Raises:
        UnreachableRatioError: the ratio cannot be reached; with the arithmetic.
        BudgetError: it cannot be met within 0.5 percentage points, or nothing would be removed.
        AdaPrunerError: the layout is uniform, but the layers differ in size.
    """
    weights = _block_weights(structure, budget)
    for layer in budget.without_attention:
        if budget.allocation == "uniform" or layer not in structure.attention_parameters:
            raise BudgetError(f"the attention of layer {layer} of this {structure.model_type} cannot be removed whole")
    given = {index: budget.given_count(block) for index, block in enumerate(structure.blocks)}
    kept = {index: structure.blocks[index].groups if count is None else count for index, count in given.items()}

    def removing(*kinds: Kind) -> dict[int, int]:
        """The counts of the blocks of the first kind, which shares the remaining removal with the other kinds."""
        rest = budget.ratio * structure.total_parameters - structure.removed_parameters(list(kept.values()))
        sharing = {index: weight for index, weight in weights.items() if structure.blocks[index].kind in kinds}
        wanted = _wanted(structure, budget, sharing, rest)
        return _in_steps(structure, budget, kinds[0], wanted)

    kept |= removing("heads", "experts", "channels") if budget.head_share else {}
    beside_experts = removing("channels", "experts") if structure.has_experts else {}
    kept |= removing("experts", "channels") if structure.has_experts else {}
    kept |= removing("channels")
    counts = list(kept.values())
    if beside_experts and largest_channel_share(structure, counts) > MOST_CHANNELS:
        # The few layers without experts cannot compensate for the rounding of whole experts.
        counts = list((kept | beside_experts).values())

    if not structure.removed_parameters(counts):
        raise BudgetError(
            f"a ratio of {budget.ratio:g} removes nothing: whole heads, experts and steps of {budget.round_to} channels"
            f" are more than that; {'lower `round_to` or ' if budget.round_to > 1 else ''}raise `ratio`"
        )
    if budget.ratio_of == "parameters":
        _refuse_missed_ratio(structure, budget, weights, counts)
    return counts


def can_meet(structure: Structure, budget: Budget) -> bool:
    """True if the allocation of a budget can meet its ratio."""
    try:
        kept_counts(structure, budget)
    except BudgetError:
        return False
    return True


def reference_budget(config: PruneConfig, structure: Structure, ratio: float) -> Budget:
    """The budget that the options of a config describe; see `default_budget`."""
    shares = config.protect_first, config.protect_last, config.head_share
    return default_budget(structure, ratio, config.layout, config.ratio_of, config.round_to, *shares)


def default_budget(
    structure: Structure,
    ratio: float,
    layout: Layout,
    ratio_of: RatioOf,
    round_to: int,
    protect_first: int | None,
    protect_last: int | None,
    head_share: float | None,
) -> Budget:
    """The budget that options describe. By default, feed-forward channels of the middle layers are removed; more layers
    and heads only if that would remove more than `MOST_CHANNELS` of the channels of a layer.
    """
    reachable: dict[Budget, float] = {}
    for first, last, heads in _DEFAULT_ALLOCATIONS:
        profile = Profile(
            first if protect_first is None else protect_first, last if protect_last is None else protect_last
        )
        allocation: Allocation = "uniform" if layout == "uniform" else profile
        counted: RatioOf = "groups" if ratio_of == "groups" else "parameters"
        budget = Budget(ratio, allocation, heads if head_share is None else head_share, round_to, counted)
        try:
            largest = largest_channel_share(structure, kept_counts(structure, budget))
        except BudgetError as error:
            refusal = error
        else:
            if largest <= MOST_CHANNELS:
                return budget
            reachable[budget] = largest
    if not reachable:
        raise refusal
    return min(reachable, key=reachable.__getitem__)


def largest_channel_share(structure: Structure, counts: Sequence[int]) -> float:
    """The largest share of feed-forward channels removed from a layer."""
    channels = (
        1 - count / block.groups
        for block, count in zip(structure.blocks, counts, strict=True)
        if block.kind == "channels"
    )
    return max(channels, default=0.0)


def _block_weights(structure: Structure, budget: Budget) -> dict[int, float]:
    """By block number, the weights of blocks that lose groups in proportion to them; 1 for experts of all layers."""
    by_layer, weights = _layer_weights(structure, budget.allocation), dict[int, float]()
    for index, block in enumerate(structure.blocks):
        layer_weights = by_layer.channels if _is_plain(block) else by_layer.others
        weight = 1.0 if block.kind == "experts" else layer_weights[block.layer]
        if weight and budget.given_count(block) is None:
            weights[index] = weight
    return weights


def _is_plain(block: Block) -> bool:
    """True for the channels of a feed-forward without experts."""
    return block.kind == "channels" and not block.experts


def _layer_weights(structure: Structure, allocation: Allocation) -> LayerWeights:
    if isinstance(allocation, LayerWeights):
        return allocation
    if isinstance(allocation, Profile):
        weights = allocation.weights(structure.layers)
        return LayerWeights(weights, weights)
    sizes = {(block.kind, bool(block.experts), block.groups) for block in structure.blocks}
    if len(sizes) > len({size[:2] for size in sizes}):
        raise AdaPrunerError("the layers of this model differ already: a uniform layout cannot be cut out of it")
    return LayerWeights((1.0,) * structure.layers, (1.0,) * structure.layers)


def _wanted(structure: Structure, budget: Budget, weights: dict[int, float], target: float) -> dict[int, float]:
    """Groups that each block would keep if fractions of them could be removed, `target` parameters in all."""
    blocks = {index: structure.blocks[index] for index in weights}
    relative = {index: budget.head_share if block.kind == "heads" else 1.0 for index, block in blocks.items()}

    def shares(scale: float) -> dict[int, float]:
        return {index: relative[index] * min(1.0, scale * weight) for index, weight in weights.items()}

    low, high = 0.0, budget.ratio if budget.ratio_of == "groups" else 1.0 / min(weights.values(), default=1.0)
    for _ in range(60 if budget.ratio_of == "parameters" else 0):
        middle = (low + high) / 2
        removed = sum(
            share * blocks[index].groups * blocks[index].parameters_per_group for index, share in shares(middle).items()
        )
        low, high = (middle, high) if removed < target else (low, middle)
    return {index: (1 - share) * blocks[index].groups for index, share in shares(high).items()}


def _in_steps(structure: Structure, budget: Budget, kind: Kind, wanted: dict[int, float]) -> dict[int, int]:
    """Counts of the blocks of a kind, rounded to whole steps; rounding errors are carried over if layers may differ."""
    blocks = {index: structure.blocks[index] for index in wanted if structure.blocks[index].kind == kind}
    counts: dict[int, int] = {}
    carried, carries = 0.0, budget.allocation != "uniform" and budget.ratio_of == "parameters"
    for index, block in blocks.items():
        count = wanted[index]
        if kind == "experts":
            # The same number in all layers, as in stock models.
            count = math.fsum(wanted[number] for number in blocks) / len(blocks)
        elif count >= block.groups:
            # A block that loses nothing does not make up for the rounding of others either.
            counts[index] = block.groups
            continue
        elif carries:
            count += carried
        unit = (budget.round_to if kind == "channels" else 1) * block.strata
        least = unit * math.ceil(block.least / unit)
        counts[index] = min(max(unit * round(count / unit), least), block.groups)
        carried = count - counts[index]
    return counts


def _refuse_missed_ratio(
    structure: Structure, budget: Budget, weights: dict[int, float], counts: Sequence[int]
) -> None:
    total = structure.total_parameters
    reached = structure.removed_parameters(counts) / total
    if abs(reached - budget.ratio) <= RATIO_TOLERANCE:
        return
    blocks = {index: structure.blocks[index] for index in weights}

    def largest(head_share: float) -> float:
        """Share of all parameters removed together with every removable channel and expert, rounded down."""
        most = dict(enumerate(counts))
        wanted = {i: (1 - head_share) * block.groups if block.kind == "heads" else 0.0 for i, block in blocks.items()}
        for kind in get_args(Kind):
            most |= _in_steps(structure, budget, kind, wanted)
        return math.floor(1000 * structure.removed_parameters(list(most.values())) / total) / 1000

    if (possible := largest(budget.head_share)) < budget.ratio:
        protected = ""
        if budget.allocation != "uniform":
            by_layer = _layer_weights(structure, budget.allocation).others
            ends = (by_layer, by_layer[::-1])
            first, last = (next((i for i, weight in enumerate(end) if weight), 0) for end in ends)
            protected = f"with the first {first} and the last {last} of {structure.layers} layers protected, "
        hints = not isinstance(budget.heads, tuple) and budget.heads < 1
        more = f", {largest(1):.3f} with equal shares (`head_share` 1)" if hints else ""
        raise UnreachableRatioError(
            f"a ratio of {budget.ratio:g} cannot be reached: {protected}at most {possible:.3f}"
            f" of the {total:,} parameters can be removed{more}"
        )
    if experts := [block for block in blocks.values() if block.kind == "experts"]:
        step = sum(block.strata * block.parameters_per_group for block in experts) / total
        raise BudgetError(
            f"a ratio of {budget.ratio:g} is not met: whole experts, the same number in every layer, come in steps of"
            f" {step:.4f}, and here to {reached:.4f}; choose a `ratio` near a multiple of that"
        )
    lower = "`round_to` or `head_share`" if budget.round_to > 1 else "`head_share`"
    raise BudgetError(
        f"a ratio of {budget.ratio:g} is not met: whole heads, experts and steps of {budget.round_to} channels come to"
        f" {reached:.4f}, more than {RATIO_TOLERANCE} off; lower {lower}"
    )
