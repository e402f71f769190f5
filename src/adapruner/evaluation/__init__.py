"""What a model can do and how fast: perplexity, tasks of lm-eval; with the protocol beside every number."""

from adapruner.evaluation._perplexity import (
    PROTOCOLS,
    Perplexity,
    log_probabilities,
    losses_by_batch,
    measure_perplexity,
    window_losses,
)
from adapruner.evaluation._tasks import COMMONSENSE, Tasks, TaskScore, load_tasks, mean_accuracies, measure_tasks

__all__ = [
    "COMMONSENSE",
    "PROTOCOLS",
    "Perplexity",
    "TaskScore",
    "Tasks",
    "load_tasks",
    "log_probabilities",
    "losses_by_batch",
    "mean_accuracies",
    "measure_perplexity",
    "measure_tasks",
    "window_losses",
]
