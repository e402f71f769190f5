"""AdaPruner: makes causal language models really smaller.

`prune` does the whole job, `load` reads what it wrote; the command line offers the same.
"""

from __future__ import annotations

from adapruner.config import PruneConfig, PruneOptions, RecoveryOptions
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import Perplexity, Speed, TaskScore
from adapruner.pipeline import join, plan_again, prune
from adapruner.planning import PruningPlan
from adapruner.result import PruneResult
from adapruner.verbs import Evaluation, benchmark, evaluate, export, load, recover

__version__ = "0.1.0"

__all__ = [
    "AdaPrunerError",
    "Evaluation",
    "Perplexity",
    "PruneConfig",
    "PruneOptions",
    "PruneResult",
    "PruningPlan",
    "RecoveryOptions",
    "Speed",
    "TaskScore",
    "benchmark",
    "evaluate",
    "export",
    "join",
    "load",
    "plan_again",
    "prune",
    "recover",
]
