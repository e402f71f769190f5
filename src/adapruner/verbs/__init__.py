"""Operations on one model, dense or pruned, outside of a pruning run; and the report of a run."""

from adapruner.verbs._benchmark import benchmark
from adapruner.verbs._evaluate import Evaluation, evaluate
from adapruner.verbs._export import Exported, export
from adapruner.verbs._inspect import Estimate, estimate, inspect
from adapruner.verbs._load import load
from adapruner.verbs._recover import recover
from adapruner.verbs._report import write_reports

__all__ = [
    "Estimate",
    "Evaluation",
    "Exported",
    "benchmark",
    "estimate",
    "evaluate",
    "export",
    "inspect",
    "load",
    "recover",
    "write_reports",
]
