"""From an allocation to weights of blocks, and from weights and a ratio to the number of groups kept in each block."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor

from adapruner.base.errors import AdaPrunerError
from adapruner.options import Layout, PruneConfig, RatioOf
from adapruner.structure.blocks import Block, Kind, Structure

RATIO_TOLERANCE = 0.005
# Removing more of the channels of a layer hurts more than removing heads or pruning more layers
# (research/experiments/allocation.md).
MOST_CHANNELS = 0.8
# Up to this share of the channels of a layer, removing heads too gains nothing (research/experiments/costs.md).
CHANNELS_BEFORE_HEADS = 0.5


class BudgetError(AdaPrunerError):
    """A budget that this model cannot meet with this allocation."""


class UnreachableRatioError(BudgetError):
    """The ratio is higher than the allocation allows."""


@dataclass(frozen=True)
class Profile:
    """Equal shares of all layers but protected ones.

    Attributes:
        protect_first: layers at the input that are kept whole.
        protect_last: layers at the output that are kept whole.
    """

    protect_first: int = 4
    protect_last: int = 1

    def weights(self, layers: int) -> tuple[float, ...]:
        """The weight of every layer; 0 for protected layers."""
        first, count = self.protect_first, layers - self.protect_first - self.protect_last
        if count <= 0:
            raise UnreachableRatioError(
                f"all {layers} layers are protected ({self.protect_first} first, {self.protect_last} last); lower"
                " `protect_first` or `protect_last`"
            )
        return (0.0,) * first + (1.0,) * count + (0.0,) * self.protect_last


@dataclass(frozen=True)
class ByCost:
    """What costs least per parameter is removed first, wherever it is (research/experiments/costs.md).

    Attributes:
        protect_first: layers at the input that are kept whole: few tokens decide what these cost, and they are rare.
        protect_last: layers at the output that are kept whole.
        heads: False removes single heads nowhere.
        whole_attention: False keeps some heads in every layer.
    """

    protect_first: int = 0
    protect_last: int = 0
    heads: bool = True
    whole_attention: bool = True

    def may_remove(self, structure: Structure, block: Block) -> bool:
        """True if a block may lose all of its groups."""
        return self.whole_attention and structure.is_removable(block)

    def cut_blocks(self, structure: Structure) -> dict[int, Block]:
        """The blocks that may lose groups, by number."""
        layers = range(self.protect_first, structure.layers - self.protect_last)
        return {
            number: block
            for number, block in enumerate(structure.blocks)
            if block.layer in layers and (self.heads or block.kind != "heads" or self.may_remove(structure, block))
        }


# `uniform`: all layers keep the same number of heads and of channels, which any loader of the family supports.
Allocation: TypeAlias = Literal["uniform"] | Profile | ByCost
# Protected layers at both ends and share of heads, from the least harmful to the one that reaches the highest ratio.
_DEFAULT_ALLOCATIONS = ((*astuple(Profile()), 0.0), (2, 1, 0.0), (1, 1, 0.0), (1, 1, 0.5), (2, 1, 1.0), (0, 0, 1.0))


@dataclass(frozen=True)
class Budget:
    """The amount to remove, and its division among the blocks.

    The allocation gives every block a weight: groups are removed in proportion to it, and none if it is 0. The same
    number of whole experts is removed from all layers.

    Attributes:
        ratio: share of all parameters to remove, embeddings counted, tied ones once; see `ratio_of`.
        heads: share of heads removed, relative to the share of channels removed (0 leaves attention whole; 1 gives the
            equal shares of LLM-Pruner, arXiv 2305.11627, and of the paper).
        round_to: kept feed-forward widths are multiples of this.
        tensor_parallel: kept heads and experts are multiples of this; a block with fewer loses none.
        ratio_of: `groups` makes the ratio a share of the channels (and, times `heads`, of the heads) of a layer of
            weight 1, rounded in each layer, as in the protocol of LLM-Pruner.
    """

    ratio: float
    allocation: Allocation = Profile()
    heads: float = 0.0
    round_to: int = 1
    tensor_parallel: int = 1
    ratio_of: RatioOf = "parameters"

    def step(self, block: Block) -> int:
        """What the number of groups that a block keeps is a multiple of."""
        return (
            math.lcm(block.strata, self.tensor_parallel) if block.kind != "channels" else self.round_to * block.strata
        )


def kept_counts(structure: Structure, budget: Budget, costs: Tensor | None = None) -> list[int]:
    """Number of groups that each block keeps, in the order of `structure.blocks`.

    Args:
        costs: for `ByCost`, [groups], in nats per token: what each group adds to the loss when the groups of its block
            are removed one after the other, the cheapest first.

    Only whole steps can be removed. The rounding error of a layer is passed on to the following layers, and that of
    heads to the channels.
    """
    if isinstance(budget.allocation, ByCost):
        assert costs is not None
        return _cheapest(structure, budget, budget.allocation, costs)
    # 1 for experts of all layers.
    by_layer = _layer_weights(structure, budget.allocation)
    weights = {i: 1.0 if block.kind == "experts" else by_layer[block.layer] for i, block in enumerate(structure.blocks)}
    weights = {index: weight for index, weight in weights.items() if weight}
    kept = {index: block.groups for index, block in enumerate(structure.blocks)}

    def removing(*kinds: Kind) -> dict[int, int]:
        """The counts of the blocks of the first kind, which shares the remaining removal with the other kinds."""
        rest = budget.ratio * structure.total_parameters - structure.removed_parameters(list(kept.values()))
        sharing = {index: weight for index, weight in weights.items() if structure.blocks[index].kind in kinds}
        wanted = _wanted(structure, budget, sharing, rest)
        return _in_steps(structure, budget, kinds[0], wanted)

    kept |= removing("heads", "experts", "channels") if budget.heads else {}
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


class _Removal(NamedTuple):
    """The cheapest removal of so many groups from a block."""

    groups: int
    parameters: int
    cost: float


def _cheapest(structure: Structure, budget: Budget, allocation: ByCost, costs: Tensor) -> list[int]:
    """The counts of `ByCost`: the lower convex hulls of cost over parameters of all blocks are descended together."""
    curves, steps = dict[int, list[_Removal]](), list[tuple[float, int, int, int]]()
    of_blocks = costs.double().split([block.groups for block in structure.blocks])
    for number, block in allocation.cut_blocks(structure).items():
        whole, partly = allocation.may_remove(structure, block), allocation.heads or block.kind != "heads"
        curves[number] = curve = _removals(block, of_blocks[number], budget.step(block), partly, whole)
        steps += [(slope, number, begin, end) for slope, begin, end in _hull(curve)]
    target = budget.ratio * structure.total_parameters
    counts, left, full = [block.groups for block in structure.blocks], target, set[int]()
    for _, number, begin, end in sorted(steps):
        if number in full:
            continue
        curve, block = curves[number], structure.blocks[number]
        room, chosen = left + curve[begin].parameters, end
        if curve[end].parameters > room:
            full.add(number)
            # Channels are small enough to be rounded up.
            off = [abs(room - curve[place].parameters) for place in range(begin, end + 1)]
            fitting = [place for place in range(begin, end) if curve[place].parameters <= room]
            chosen = begin + off.index(min(off)) if block.kind == "channels" else max(fitting, default=begin)
        left = room - curve[chosen].parameters
        counts[number] = block.groups - curve[chosen].groups
    reached, most = target - left, sum(curve[-1].parameters for curve in curves.values())
    if abs(reached - target) > RATIO_TOLERANCE * structure.total_parameters:
        raise UnreachableRatioError(
            f"a ratio of {budget.ratio:g} cannot be reached: at most {most / structure.total_parameters:.3f} of the"
            f" {structure.total_parameters:,} parameters can be removed"
            if most < target
            else f"a ratio of {budget.ratio:g} is not met: whole heads and steps of {budget.round_to} channels come to"
            f" {reached / structure.total_parameters:.4f}; choose a `ratio` near that, or lower `round_to`"
        )
    if not reached:
        raise BudgetError(f"a ratio of {budget.ratio:g} removes nothing: lower `round_to` or raise `ratio`")
    return counts


def _removals(block: Block, costs: Tensor, unit: int, partly: bool, whole: bool) -> list[_Removal]:
    """What can be removed from a block in whole steps, from nothing to the most."""
    fewest = max(block.least, math.ceil((1 - MOST_CHANNELS) * block.groups) if block.kind == "channels" else 1)
    steps = range(-(-fewest // unit), -(-block.groups // unit)) if partly else ()
    kept = [*([0] if whole else []), *(unit * count for count in steps)]
    ascending = costs.view(block.strata, -1).sort(1).values.sum(0).cumsum(0).tolist()
    return [_Removal(0, 0, 0.0)] + [
        _Removal(
            block.groups - count,
            (block.groups - count) * block.parameters_per_group + (0 if count else block.rest),
            ascending[(block.groups - count) // block.strata - 1],
        )
        for count in reversed(kept)
    ]


def _hull(curve: Sequence[_Removal]) -> list[tuple[float, int, int]]:
    """The steps of the lower convex hull of a curve: their costs per parameter, which ascend, and the places of their
    ends."""
    steps = list[tuple[float, int, int]]()
    for end in range(1, len(curve)):
        begin = end - 1
        while True:
            slope = (curve[end].cost - curve[begin].cost) / (curve[end].parameters - curve[begin].parameters)
            if not steps or steps[-1][0] < slope:
                break
            begin = steps.pop()[1]
        steps.append((slope, begin, end))
    return steps


def reference_budget(config: PruneConfig, structure: Structure, ratio: float) -> Budget:
    """The budget that the options of a config describe; see `default_budget`."""
    shares = config.protect_first, config.protect_last, config.head_share
    return default_budget(
        structure, ratio, config.layout, config.ratio_of, config.round_to, *shares, config.tensor_parallel
    )


def default_budget(
    structure: Structure,
    ratio: float,
    layout: Layout,
    ratio_of: RatioOf,
    round_to: int,
    protect_first: float | None,
    protect_last: float | None,
    head_share: float | None,
    tensor_parallel: int = 1,
) -> Budget:
    """The budget that options describe. By default, feed-forward channels of the middle layers are removed; more layers
    and heads only if that would remove more than `MOST_CHANNELS` of the channels of a layer.
    """
    reachable: dict[Budget, float] = {}
    for first, last, heads in _DEFAULT_ALLOCATIONS:
        profile = Profile(
            first if protect_first is None else _layers(protect_first, structure.layers),
            last if protect_last is None else _layers(protect_last, structure.layers),
        )
        allocation: Allocation = "uniform" if layout == "uniform" else profile
        counted: RatioOf = "groups" if ratio_of == "groups" else "parameters"
        budget = Budget(
            ratio, allocation, heads if head_share is None else head_share, round_to, tensor_parallel, counted
        )
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


def _layers(number: float, depth: int) -> int:
    """A number of layers, which may be given as a share of the depth: then rounded, and at least one."""
    return int(number) if number >= 1 or not number else max(1, math.floor(number * depth + 0.5))


def largest_channel_share(structure: Structure, counts: Sequence[int]) -> float:
    """The largest share of feed-forward channels removed from a layer."""
    channels = (
        1 - count / block.groups
        for block, count in zip(structure.blocks, counts, strict=True)
        if block.kind == "channels"
    )
    return max(channels, default=0.0)


def _layer_weights(structure: Structure, allocation: Allocation) -> tuple[float, ...]:
    if isinstance(allocation, Profile):
        return allocation.weights(structure.layers)
    sizes = {(block.kind, bool(block.experts), block.groups) for block in structure.blocks}
    if len(sizes) > len({size[:2] for size in sizes}):
        raise AdaPrunerError("the layers of this model differ already: a uniform layout cannot be cut out of it")
    return (1.0,) * structure.layers


def _wanted(structure: Structure, budget: Budget, weights: dict[int, float], target: float) -> dict[int, float]:
    """Groups that each block would keep if fractions of them could be removed, `target` parameters in all."""
    blocks = {index: structure.blocks[index] for index in weights}
    relative = {index: budget.heads if block.kind == "heads" else 1.0 for index, block in blocks.items()}

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
        unit = budget.step(block)
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

    if (possible := largest(budget.heads)) < budget.ratio:
        protected = ""
        if budget.allocation != "uniform":
            by_layer = _layer_weights(structure, budget.allocation)
            ends = (by_layer, by_layer[::-1])
            first, last = (next((i for i, weight in enumerate(end) if weight), 0) for end in ends)
            protected = f"with the first {first} and the last {last} of {structure.layers} layers protected, "
        hints = budget.heads < 1
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
        f" {reached:.4f}, more than {RATIO_TOLERANCE} off; choose a `ratio` near that, or lower {lower}"
    )
