"""AdaPruner: makes causal language models really smaller.

`prune` does the whole job, `load` reads what it wrote; the command line offers the same.
"""

from __future__ import annotations

from adapruner.config import PruneConfig, PruneOptions
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import Perplexity
from adapruner.pipeline import plan_again, prune
from adapruner.planning import PruningPlan
from adapruner.result import PruneResult
from adapruner.verbs import evaluate, export, load

__version__ = "0.1.0"

__all__ = [
    "AdaPrunerError",
    "Perplexity",
    "PruneConfig",
    "PruneOptions",
    "PruneResult",
    "PruningPlan",
    "evaluate",
    "export",
    "load",
    "plan_again",
    "prune",
]
