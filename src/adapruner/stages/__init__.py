"""The stages of a run: each takes up what the run folder holds of it, does the rest, and leaves it there."""

from adapruner.stages._choosing import help_searching, plan_at_ratio, stage_plan, stage_search
from adapruner.stages._finishing import (
    count_saved_parameters,
    stage_evaluate,
    stage_recover,
    stage_save,
    stage_tasks,
    write_cards,
)
from adapruner.stages._measuring import (
    drop_broken_windows,
    help_measuring,
    stage_load,
    stage_measure,
    stage_moments,
    stage_windows,
)

__all__ = [
    "count_saved_parameters",
    "drop_broken_windows",
    "help_measuring",
    "help_searching",
    "plan_at_ratio",
    "stage_evaluate",
    "stage_load",
    "stage_measure",
    "stage_moments",
    "stage_plan",
    "stage_recover",
    "stage_save",
    "stage_search",
    "stage_tasks",
    "stage_windows",
    "write_cards",
]
