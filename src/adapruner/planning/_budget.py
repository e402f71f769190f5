"""How many groups each block keeps, so that a ratio of all parameters is removed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapruner.config import Layout, PruneConfig, RatioOf
from adapruner.errors import AdaPrunerError
from adapruner.models import Whole
from adapruner.structure import Block, Structure

RATIO_TOLERANCE = 0.005
# Taking more of the channels of a layer hurts more than taking heads or fewer layers whole (see docs/experiments.md).
MOST_CHANNELS = 0.8
# Protected layers at both ends and share of heads, from what hurts least to what reaches furthest.
_DEFAULT_ALLOCATIONS = ((4, 3, 0.0), (2, 2, 0.0), (1, 1, 0.0), (1, 1, 0.5), (2, 1, 1.0), (0, 0, 1.0))


class BudgetError(AdaPrunerError):
    """A budget that this model cannot meet; another allocation may."""


class UnreachableRatioError(BudgetError):
    """More would have to be removed than the allocation allows."""


Ranking = Literal["local", "global"]

_Blocks = Mapping[int, Block]


@dataclass(frozen=True)
class Budget:
    """What is to be removed and where.

    Attributes:
        ratio: share of all parameters to remove, embeddings counted, tied ones once; see `ratio_of`.
        protect_first: layers at the input that are kept whole.
        protect_last: layers at the output that are kept whole.
        head_share: share of heads removed, relative to the share of channels removed; 0 leaves attention whole, 1 is
            the equal shares of LLM-Pruner (arXiv 2305.11627) and the paper.
        round_to: kept feed-forward widths are multiples of this.
        layout: whether layers may differ, or all keep the same number of heads and of channels, which any reader of
            the model family can load. A uniform layout protects no layer and has no ranking and no depth profile.
        ranking: `local` removes by the depth profile alone; `global` removes the groups that score least anywhere,
            heads and channels alike (as FLAP does, arXiv 2312.11983), whose scores must then compare between blocks.
        tilt, bend: the depth profile. With z from -1 at the first unprotected layer to 1 at the last, a layer gives up
            a share in proportion to exp(tilt · z - bend · z²); `global` divides scores by that.
        ratio_of: `groups` makes the ratio a share of the channels (and, times `head_share`, of the heads) of every
            unprotected layer, as LLM-Pruner's protocol has it, rounded in each; ranking and profile are of no account.
        shares: for every layer, how large a share of its channels it gives up, relative to the others; replaces
            protection, ranking and profile for channels alone. Empty: as those say.
        heads: for every layer, how many groups of heads it keeps; replaces `head_share`, protection, ranking and
            profile for heads, and channels make up for it. Empty: as those say.
        without_attention, without_feed_forward: layers whose attention, and layers whose feed-forward, are removed
            whole, protected or not. A layer in both is removed.
    """

    ratio: float
    protect_first: int = 4
    protect_last: int = 3
    head_share: float = 0.0
    round_to: int = 1
    layout: Layout = "per-layer"
    ranking: Ranking = "local"
    tilt: float = 0.0
    bend: float = 0.0
    ratio_of: RatioOf = "parameters"
    shares: tuple[float, ...] = ()
    heads: tuple[int, ...] = ()
    without_attention: tuple[int, ...] = ()
    without_feed_forward: tuple[int, ...] = ()

    def removes_whole(self, block: Block) -> bool:
        """Whether no group of a block is kept."""
        return block.layer in (self.without_attention if block.kind == "heads" else self.without_feed_forward)


def kept_counts(structure: Structure, budget: Budget, scores: Tensor | None = None) -> list[int]:
    """How many groups each block keeps, in the order of `structure.blocks`.

    What one layer cannot give up exactly, because only whole steps can be removed, is made up by the following ones,
    and what heads cannot give up exactly, by channels.

    Args:
        scores: [groups], for the ranking `global`.

    Raises:
        UnreachableRatioError: the ratio cannot be reached; with the arithmetic.
        BudgetError: it cannot be met within 0.5 percentage points, or nothing would be removed.
        AdaPrunerError: layers of different sizes shall become alike.
    """
    layers = _unprotected(structure, budget)
    _refuse_impossible_whole(structure, budget)
    everywhere = {index: block for index, block in enumerate(structure.blocks) if not budget.removes_whole(block)}
    # Experts are the same in number in all layers, as stock models have them.
    experts = {index: block for index, block in everywhere.items() if block.kind == "experts"}
    heads = {
        index: block
        for index, block in everywhere.items()
        if block.kind == "heads" and (budget.heads or block.layer in layers)
    }
    channels = {
        index: block
        for index, block in everywhere.items()
        if block.kind == "channels" and ((budget.shares and not block.experts) or block.layer in layers)
    }
    target = budget.ratio * structure.total_parameters
    by_block = _scores_to_rank(structure, budget, scores)

    kept = dict.fromkeys(range(len(structure.blocks)), 0) | {index: each.groups for index, each in everywhere.items()}

    def counts() -> list[int]:
        return list(kept.values())

    def counts_of(blocks: _Blocks, others: _Blocks, step: int = 1) -> dict[int, int]:
        """How many groups some blocks keep, when they share the rest of the target with others."""
        rest = target - structure.removed_parameters(counts())
        together = dict(sorted({**blocks, **others}.items()))
        return _in_steps(budget, blocks, _wanted(budget, layers, together, rest, by_block), step)

    if budget.heads:
        kept |= {index: budget.heads[block.layer] for index, block in heads.items()}
    else:
        kept |= counts_of(heads, {**experts, **channels})
    beside_experts = counts_of(channels, experts, budget.round_to) if experts else {}
    kept |= counts_of(experts, channels)
    kept |= counts_of(channels, {}, budget.round_to)
    if experts and largest_channel_share(structure, counts()) > MOST_CHANNELS:
        # The few layers without experts cannot make up for what whole experts miss.
        kept |= beside_experts

    _refuse_nothing_removed(structure, budget, counts())
    if budget.ratio_of == "parameters":
        _refuse_missed_ratio(structure, budget, {**({} if budget.heads else heads), **experts}, channels, counts())
    return counts()


def reference_budget(config: PruneConfig, structure: Structure, ratio: float) -> Budget:
    """What is to be removed, from where the options say; else from the feed-forward channels of the middle layers, and
    from more layers and heads only where that would take more than `MOST_CHANNELS` of the channels of a layer.

    Raises:
        AdaPrunerError: the ratio cannot be met; with the arithmetic.
    """
    given = {
        name: value
        for name in ("protect_first", "protect_last", "head_share")
        if (value := getattr(config, name)) is not None
    }
    reachable: dict[Budget, float] = {}
    for first, last, head_share in _DEFAULT_ALLOCATIONS:
        fields = {"protect_first": first, "protect_last": last, "head_share": head_share} | given
        budget = Budget(ratio, round_to=config.round_to, layout=config.layout, ratio_of=config.ratio_of, **fields)
        try:
            taken = largest_channel_share(structure, kept_counts(structure, budget))
        except BudgetError as error:
            refusal = error
        else:
            if taken <= MOST_CHANNELS:
                return budget
            reachable[budget] = taken
    if not reachable:
        raise refusal
    return min(reachable, key=reachable.__getitem__)


def largest_channel_share(structure: Structure, counts: Sequence[int]) -> float:
    """The largest share of feed-forward channels removed from a layer, among the layers that keep some."""
    channels = (
        1 - count / block.groups
        for block, count in zip(structure.blocks, counts, strict=True)
        if block.kind == "channels" and count
    )
    return max(channels, default=0.0)


def _unprotected(structure: Structure, budget: Budget) -> range:
    if budget.layout == "uniform":
        sizes = {(block.kind, bool(block.experts), block.groups) for block in structure.blocks}
        if len(sizes) > len({each[:2] for each in sizes}):
            raise AdaPrunerError("the layers of this model differ already: a uniform layout cannot be cut out of it")
        return range(structure.layers)
    layers = range(budget.protect_first, structure.layers - budget.protect_last)
    if not layers:
        raise UnreachableRatioError(
            f"all {structure.layers} layers are protected ({budget.protect_first} first, {budget.protect_last} last);"
            " lower `protect_first` or `protect_last`"
        )
    return layers


def _scores_to_rank(structure: Structure, budget: Budget, scores: Tensor | None) -> Sequence[Tensor] | None:
    """The scores of each block where groups are ranked over all layers."""
    if budget.ranking == "local" or budget.shares or budget.layout == "uniform" or budget.ratio_of == "groups":
        return None
    if scores is None:
        raise AdaPrunerError("a global ranking needs scores")
    # Standardised scores may be negative, and dividing those by a weight would turn their order round.
    scores = scores - scores.min().clamp_max(0)
    by_block: Sequence[Tensor] = scores.split([block.groups for block in structure.blocks])
    return by_block


def _wanted(
    budget: Budget, layers: range, blocks: _Blocks, target: float, scores: Sequence[Tensor] | None
) -> dict[int, float]:
    """How many groups each block would keep if fractions could go."""
    if not blocks:
        return {}
    profile = {
        index: 1.0 if budget.layout == "uniform" or block.kind == "experts" else _profile(budget, layers, block.layer)
        for index, block in blocks.items()
    }
    if budget.shares:
        # As much as the profile would take together, so that heads keep their part.
        shared = {i: block.layer for i, block in blocks.items() if block.kind == "channels" and not block.experts}
        by_profile = math.fsum(profile[index] for index, layer in shared.items() if layer in layers)
        factor = by_profile / (math.fsum(budget.shares[layer] for layer in shared.values()) or 1.0)
        profile |= {index: factor * budget.shares[layer] for index, layer in shared.items()}
    relative = {index: budget.head_share if block.kind == "heads" else 1.0 for index, block in blocks.items()}
    if budget.ratio_of == "groups":
        return {index: (1 - relative[index] * budget.ratio) * block.groups for index, block in blocks.items()}
    if scores is not None:
        return _by_global_ranking({index: profile[index] * relative[index] for index in blocks}, blocks, target, scores)

    def shares(scale: float) -> dict[int, float]:
        return {index: relative[index] * min(1.0, scale * profile[index]) for index in blocks}

    low, high = 0.0, 1.0 / min(filter(None, profile.values()), default=1.0)
    for _ in range(60):
        middle = (low + high) / 2
        removed = sum(
            share * blocks[index].groups * blocks[index].parameters_per_group for index, share in shares(middle).items()
        )
        low, high = (middle, high) if removed < target else (low, middle)
    return {index: (1 - share) * blocks[index].groups for index, share in shares(high).items()}


def _by_global_ranking(
    weights: dict[int, float], blocks: _Blocks, target: float, scores: Sequence[Tensor]
) -> dict[int, float]:
    """Removes the groups of least score / weight until the target is met; the best of each block is kept."""
    willing = {index: block for index, block in blocks.items() if weights[index] > 0}
    if not willing:
        return {index: float(block.groups) for index, block in blocks.items()}
    keys = torch.cat(
        [
            torch.where(scores[index] == scores[index].max(), torch.inf, scores[index].double() / weights[index])
            for index in willing
        ]
    )
    owners = torch.cat([torch.full((block.groups,), index) for index, block in willing.items()])
    sizes = torch.cat([torch.full((block.groups,), block.parameters_per_group) for block in willing.values()])
    ascending = keys.argsort(stable=True)
    gone = ascending[: int((sizes[ascending].cumsum(0) <= target).sum())]
    removed = torch.bincount(owners[gone], minlength=max(blocks) + 1)
    return {index: float(block.groups - removed[index]) for index, block in blocks.items()}


def _profile(budget: Budget, layers: range, layer: int) -> float:
    z = 2 * (layer - layers.start) / max(1, len(layers) - 1) - 1
    return math.exp(budget.tilt * z - budget.bend * z * z)


def _in_steps(budget: Budget, blocks: _Blocks, wanted: dict[int, float], step: int) -> dict[int, int]:
    """Counts near the wanted ones in whole steps, with the rounding carried over where layers may differ by that."""
    counts: dict[int, int] = {}
    carried, carries = 0.0, budget.layout == "per-layer" and budget.ratio_of == "parameters"
    of_experts = [wanted[index] for index, block in blocks.items() if block.kind == "experts"]
    for index, block in blocks.items():
        if block.kind != "experts" and wanted[index] >= block.groups:
            # What gives up nothing does not make up for the rounding of others either.
            counts[index] = block.groups
            continue
        unit = step * block.strata
        if block.kind == "experts":
            carried = math.fsum(of_experts) / len(of_experts)
        else:
            carried = wanted[index] + (carried if carries else 0.0)
        least = unit * math.ceil(block.least / unit)
        counts[index] = min(max(unit * round(carried / unit), least), block.groups)
        carried -= counts[index]
    return counts


def _refuse_impossible_whole(structure: Structure, budget: Budget) -> None:
    attention, feed_forward = set(budget.without_attention), set(budget.without_feed_forward)
    layers = attention & feed_forward
    wanted: dict[Whole, set[int]] = {
        "attention": attention - layers,
        "feed-forward": feed_forward - layers,
        "layer": layers,
    }
    for whole, removed in wanted.items():
        is_allowed = whole in structure.whole and (whole == "layer" or budget.layout == "per-layer")
        if impossible := removed - (structure.whole_parameters(whole).keys() if is_allowed else set()):
            raise BudgetError(
                f"the {whole} of layer {min(impossible)} of this {structure.model_type} cannot be removed whole"
            )


def _refuse_nothing_removed(structure: Structure, budget: Budget, counts: Sequence[int]) -> None:
    if not structure.removed_parameters(counts):
        raise BudgetError(
            f"a ratio of {budget.ratio:g} removes nothing: whole heads, experts and steps of {budget.round_to} channels"
            " are more than that; lower `round_to` or raise `ratio`"
        )


def _refuse_missed_ratio(
    structure: Structure, budget: Budget, heads: _Blocks, channels: _Blocks, counts: Sequence[int]
) -> None:
    total = structure.total_parameters
    reached = structure.removed_parameters(counts) / total
    if abs(reached - budget.ratio) <= RATIO_TOLERANCE:
        return

    def largest(head_share: float) -> float:
        """The share of all parameters that is removed when every channel and expert is that may be, rounded down."""
        head_counts = {
            index: (1 - head_share) * block.groups if block.kind == "heads" else 0.0 for index, block in heads.items()
        }
        kept = _in_steps(budget, heads, head_counts, 1)
        kept |= _in_steps(budget, channels, dict.fromkeys(channels, 0.0), budget.round_to)
        most = [kept.get(index, count) for index, count in enumerate(counts)]
        return math.floor(1000 * structure.removed_parameters(most) / total) / 1000

    if largest(budget.head_share) < budget.ratio:
        protected = (
            f"with the first {budget.protect_first} and the last {budget.protect_last} of {structure.layers} layers"
            " protected, "
            if budget.layout == "per-layer"
            else ""
        )
        hints = not budget.heads and budget.head_share < 1
        more = f", {largest(1):.3f} with equal shares (`head_share` 1)" if hints else ""
        raise UnreachableRatioError(
            f"a ratio of {budget.ratio:g} cannot be reached: {protected}at most {largest(budget.head_share):.3f}"
            f" of the {total:,} parameters can be removed{more}"
        )
    of_experts = [block for block in heads.values() if block.kind == "experts"]
    if of_experts:
        step = sum(block.strata * block.parameters_per_group for block in of_experts) / total
        raise BudgetError(
            f"a ratio of {budget.ratio:g} is not met: whole experts, as many in every layer, come in steps of"
            f" {step:.4f}, and here to {reached:.4f}; choose a `ratio` near a multiple of that"
        )
    raise BudgetError(
        f"a ratio of {budget.ratio:g} is not met: whole heads, experts and steps of {budget.round_to} channels come to"
        f" {reached:.4f}, more than {RATIO_TOLERANCE} off; lower `round_to` or `head_share`"
    )
