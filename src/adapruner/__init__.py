"""AdaPruner prunes causal language models into smaller dense checkpoints.

`prune` runs the whole procedure, `load` reads its result; the command line offers the same.
"""

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
        "base.errors": "AdaPrunerError",
        "base.progress": "StageCost",
        "budget.plan": "PruningPlan",
        "evaluation.losses": "Perplexity",
        "evaluation.speed": "Speed",
        "evaluation.tasks": "TaskScore",
        "measurement.taylor": "measure",
        "options": "PruneConfig PruneOptions RecoveryOptions",
        "report.result": "RunResult",
        "run.evaluate": "Evaluation evaluate",
        "run.export": "PrunedVocabulary export vocabulary",
        "run.folder": "PruneResult",
        "run.prune": "prune",
        "run.recover": "recover",
        "run.steps": "benchmark compensate cut inspect load load_tokenizer make_windows score",
        "search.study": "TriedPoint",
    }.items()
    for name in names.split()
}

# The same for type checkers and documentation.
if TYPE_CHECKING:
    from adapruner.base.errors import AdaPrunerError as AdaPrunerError
    from adapruner.base.progress import StageCost as StageCost
    from adapruner.budget.plan import PruningPlan as PruningPlan
    from adapruner.evaluation.losses import Perplexity as Perplexity
    from adapruner.evaluation.speed import Speed as Speed
    from adapruner.evaluation.tasks import TaskScore as TaskScore
    from adapruner.measurement.taylor import measure as measure
    from adapruner.options import (
        PruneConfig as PruneConfig,
        PruneOptions as PruneOptions,
        RecoveryOptions as RecoveryOptions,
    )
    from adapruner.report.result import RunResult as RunResult
    from adapruner.run.evaluate import Evaluation as Evaluation, evaluate as evaluate
    from adapruner.run.export import PrunedVocabulary as PrunedVocabulary, export as export, vocabulary as vocabulary
    from adapruner.run.folder import PruneResult as PruneResult
    from adapruner.run.prune import prune as prune
    from adapruner.run.recover import recover as recover
    from adapruner.run.steps import (
        benchmark as benchmark,
        compensate as compensate,
        cut as cut,
        inspect as inspect,
        load as load,
        load_tokenizer as load_tokenizer,
        make_windows as make_windows,
        score as score,
    )
    from adapruner.search.study import TriedPoint as TriedPoint
else:
    __all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
