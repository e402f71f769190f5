"""From scores and a ratio to a pruning plan."""

from adapruner.planning._amount import Amount, Costs, Memory, Size, Speed, Target, TargetOutcome, amount_of
from adapruner.planning._budget import (
    MOST_CHANNELS,
    RATIO_TOLERANCE,
    Allocation,
    Budget,
    BudgetError,
    LayerWeights,
    Profile,
    UnreachableRatioError,
    kept_counts,
    largest_channel_share,
    reference_budget,
    weigh_channels,
)
from adapruner.planning._plan import BlockPlan, PruningPlan, make_plan

__all__ = [
    "MOST_CHANNELS",
    "RATIO_TOLERANCE",
    "Allocation",
    "Amount",
    "BlockPlan",
    "Budget",
    "BudgetError",
    "Costs",
    "LayerWeights",
    "Memory",
    "Profile",
    "PruningPlan",
    "Size",
    "Speed",
    "Target",
    "TargetOutcome",
    "UnreachableRatioError",
    "amount_of",
    "kept_counts",
    "largest_channel_share",
    "make_plan",
    "reference_budget",
    "weigh_channels",
]
