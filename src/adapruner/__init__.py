"""AdaPruner prunes causal language models into smaller dense checkpoints.

`prune` runs the whole procedure, `load` reads its result; the command line offers the same.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapruner.callbacks import Callback
    from adapruner.comparison import Comparison
    from adapruner.config import PruneConfig, PruneOptions, RecoveryOptions
    from adapruner.errors import AdaPrunerError
    from adapruner.evaluation import Perplexity, Speed, TaskScore
    from adapruner.planning import PruningPlan
    from adapruner.progress import StageCost
    from adapruner.result import PruneResult, RunResult
    from adapruner.run.again import plan_again
    from adapruner.run.api import prune, prune_ratios
    from adapruner.search import TriedPoint
    from adapruner.verbs import (
        Evaluation,
        PrunedVocabulary,
        benchmark,
        compare,
        compensate,
        cut,
        evaluate,
        export,
        inspect,
        load,
        load_tokenizer,
        make_windows,
        measure,
        plan,
        recover,
        score,
        vocabulary,
    )

__version__ = "0.1.0"

# Progress is shown on stderr, unless this level is raised.
logging.getLogger(__name__).setLevel(logging.INFO)

__all__ = [
    "AdaPrunerError",
    "Callback",
    "Comparison",
    "Evaluation",
    "Perplexity",
    "PruneConfig",
    "PruneOptions",
    "PruneResult",
    "PrunedVocabulary",
    "PruningPlan",
    "RecoveryOptions",
    "RunResult",
    "Speed",
    "StageCost",
    "TaskScore",
    "TriedPoint",
    "benchmark",
    "compare",
    "compensate",
    "cut",
    "evaluate",
    "export",
    "inspect",
    "load",
    "load_tokenizer",
    "make_windows",
    "measure",
    "plan",
    "plan_again",
    "prune",
    "prune_ratios",
    "recover",
    "score",
    "vocabulary",
]

# The modules of what is not in `verbs`; importing them, and PyTorch with them, waits until a name is used.
_MODULES = {
    **dict.fromkeys(("PruneConfig", "PruneOptions", "RecoveryOptions"), "config"),
    "Comparison": "comparison",
    **dict.fromkeys(("Perplexity", "Speed", "TaskScore"), "evaluation"),
    "plan_again": "run.again",
    **dict.fromkeys(("prune", "prune_ratios"), "run.api"),
    "AdaPrunerError": "errors",
    "Callback": "callbacks",
    "StageCost": "progress",
    "TriedPoint": "search",
    **dict.fromkeys(("PruneResult", "RunResult"), "result"),
    "PruningPlan": "planning",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'verbs')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
