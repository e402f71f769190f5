"""Operations on one model, dense or pruned, outside of a pruning run; and the report of a run."""

from adapruner.verbs._compare import compare
from adapruner.verbs._evaluate import Evaluation, evaluate
from adapruner.verbs._export import export
from adapruner.verbs._model import Estimate, benchmark, describe, estimate, inspect, load, load_tokenizer
from adapruner.verbs._recover import recover
from adapruner.verbs._report import write_reports
from adapruner.verbs._steps import compensate, cut, make_windows, measure, plan, score
from adapruner.verbs._vocabulary import PrunedVocabulary, vocabulary

__all__ = [
    "Estimate",
    "Evaluation",
    "PrunedVocabulary",
    "benchmark",
    "compare",
    "compensate",
    "cut",
    "describe",
    "estimate",
    "evaluate",
    "export",
    "inspect",
    "load",
    "load_tokenizer",
    "make_windows",
    "measure",
    "plan",
    "recover",
    "score",
    "vocabulary",
    "write_reports",
]
