"""AdaPruner prunes causal language models into smaller dense checkpoints.

`prune` runs the whole procedure, `load` reads its result; the command line offers the same.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

# Progress is shown on stderr, unless this level is raised.
logging.getLogger(__name__).setLevel(logging.INFO)

__version__ = "0.1.0"

# The module of every name; importing it, and PyTorch with it, waits until the name is used.
_MODULES = {
    name: module
    for module, names in {
        "config": "PruneConfig PruneOptions RecoveryOptions",
        "errors": "AdaPrunerError",
        "evaluation._perplexity": "Perplexity",
        "evaluation._speed": "Speed",
        "evaluation._tasks": "TaskScore",
        "measurement._samples": "measure",
        "planning._plan": "PruningPlan",
        "progress": "StageCost",
        "result": "PruneResult RunResult",
        "run.api": "prune",
        "search._result": "TriedPoint",
        "verbs._evaluate": "Evaluation evaluate",
        "verbs._export": "export",
        "verbs._inspect": "inspect",
        "verbs._model": "benchmark load load_tokenizer",
        "verbs._recover": "recover",
        "verbs._steps": "compensate cut make_windows score",
        "verbs._vocabulary": "PrunedVocabulary vocabulary",
    }.items()
    for name in names.split()
}

# The same for type checkers and documentation.
if TYPE_CHECKING:
    from adapruner.config import (
        PruneConfig as PruneConfig,
        PruneOptions as PruneOptions,
        RecoveryOptions as RecoveryOptions,
    )
    from adapruner.errors import AdaPrunerError as AdaPrunerError
    from adapruner.evaluation._perplexity import Perplexity as Perplexity
    from adapruner.evaluation._speed import Speed as Speed
    from adapruner.evaluation._tasks import TaskScore as TaskScore
    from adapruner.measurement._samples import measure as measure
    from adapruner.planning._plan import PruningPlan as PruningPlan
    from adapruner.progress import StageCost as StageCost
    from adapruner.result import PruneResult as PruneResult, RunResult as RunResult
    from adapruner.run.api import prune as prune
    from adapruner.search._result import TriedPoint as TriedPoint
    from adapruner.verbs._evaluate import Evaluation as Evaluation, evaluate as evaluate
    from adapruner.verbs._export import export as export
    from adapruner.verbs._inspect import inspect as inspect
    from adapruner.verbs._model import benchmark as benchmark, load as load, load_tokenizer as load_tokenizer
    from adapruner.verbs._recover import recover as recover
    from adapruner.verbs._steps import (
        compensate as compensate,
        cut as cut,
        make_windows as make_windows,
        score as score,
    )
    from adapruner.verbs._vocabulary import PrunedVocabulary as PrunedVocabulary, vocabulary as vocabulary
else:
    __all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
