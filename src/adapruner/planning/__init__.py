"""From scores and a ratio to a pruning plan."""

from adapruner.planning._budget import (
    MOST_CHANNELS,
    RATIO_TOLERANCE,
    Budget,
    BudgetError,
    UnreachableRatioError,
    kept_counts,
    largest_channel_share,
    reference_budget,
)
from adapruner.planning._plan import BlockPlan, PruningPlan, make_plan
from adapruner.planning._targets import TARGET_TOLERANCE, Costs, Target

__all__ = [
    "MOST_CHANNELS",
    "RATIO_TOLERANCE",
    "TARGET_TOLERANCE",
    "BlockPlan",
    "Budget",
    "BudgetError",
    "Costs",
    "PruningPlan",
    "Target",
    "UnreachableRatioError",
    "kept_counts",
    "largest_channel_share",
    "make_plan",
    "reference_budget",
]
