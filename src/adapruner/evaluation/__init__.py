"""What a model can do and how fast: perplexity, tasks of lm-eval, tokens per second, each with its protocol."""

from adapruner.evaluation._breakage import REPETITION_PROTOCOL, Breakage, measure_repetition
from adapruner.evaluation._losses import (
    Prefix,
    compute_prefix,
    log_probabilities,
    losses_by_batch,
    losses_in_step,
    tokens_per_batch,
)
from adapruner.evaluation._perplexity import PROTOCOLS, Perplexity, measure_perplexity, window_losses
from adapruner.evaluation._speed import Rate, Speed, count_macs, measure_speed
from adapruner.evaluation._tasks import Tasks, TaskScore, check_tasks, load_tasks, mean_accuracies, measure_tasks

__all__ = [
    "PROTOCOLS",
    "REPETITION_PROTOCOL",
    "Breakage",
    "Perplexity",
    "Prefix",
    "Rate",
    "Speed",
    "TaskScore",
    "Tasks",
    "check_tasks",
    "compute_prefix",
    "count_macs",
    "load_tasks",
    "log_probabilities",
    "losses_by_batch",
    "losses_in_step",
    "mean_accuracies",
    "measure_perplexity",
    "measure_repetition",
    "measure_speed",
    "measure_tasks",
    "tokens_per_batch",
    "window_losses",
]
