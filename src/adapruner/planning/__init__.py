"""From scores and a ratio to a pruning plan."""

from adapruner.planning._budget import Budget as Budget, Profile as Profile, kept_counts as kept_counts
from adapruner.planning._plan import make_plan as make_plan
