"""Quality and speed of a model: perplexity, tasks of lm-eval, tokens per second, each with its protocol."""

from adapruner.evaluation._breakage import (
    AGREEMENT_PROTOCOL,
    REPETITION_PROTOCOL,
    Breakage,
    agreement,
    continue_greedily,
    repetition,
)
from adapruner.evaluation._losses import (
    Prefix,
    compute_prefix,
    finite_windows,
    log_probabilities,
    losses_by_batch,
    losses_in_step,
    tokens_per_batch,
    window_losses,
)
from adapruner.evaluation._perplexity import PROTOCOLS, Perplexity, measure_perplexity
from adapruner.evaluation._speed import Rate, Speed, count_macs, measure_speed, new_cache, rate, seconds_in_turn
from adapruner.evaluation._tasks import Tasks, TaskScore, check_tasks, load_tasks, mean_accuracies, measure_tasks
from adapruner.evaluation._verdict import Verdict, judge

__all__ = [
    "AGREEMENT_PROTOCOL",
    "PROTOCOLS",
    "REPETITION_PROTOCOL",
    "Breakage",
    "Perplexity",
    "Prefix",
    "Rate",
    "Speed",
    "TaskScore",
    "Tasks",
    "Verdict",
    "agreement",
    "check_tasks",
    "compute_prefix",
    "continue_greedily",
    "count_macs",
    "finite_windows",
    "judge",
    "load_tasks",
    "log_probabilities",
    "losses_by_batch",
    "losses_in_step",
    "mean_accuracies",
    "measure_perplexity",
    "measure_speed",
    "measure_tasks",
    "new_cache",
    "rate",
    "repetition",
    "seconds_in_turn",
    "tokens_per_batch",
    "window_losses",
]
