"""From scores and a ratio to a pruning plan."""

from adapruner.planning._budget import (
    MOST_CHANNELS as MOST_CHANNELS,
    RATIO_TOLERANCE as RATIO_TOLERANCE,
    Budget as Budget,
    BudgetError as BudgetError,
    Profile as Profile,
    UnreachableRatioError as UnreachableRatioError,
    can_meet as can_meet,
    default_budget as default_budget,
    kept_counts as kept_counts,
    largest_channel_share as largest_channel_share,
    reference_budget as reference_budget,
    weigh_channels as weigh_channels,
)
from adapruner.planning._plan import BlockPlan as BlockPlan, PruningPlan as PruningPlan, make_plan as make_plan
