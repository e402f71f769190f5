"""Operations on one model, dense or pruned, outside of a pruning run; and the report of a run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapruner.run.preview import Estimate, estimate
    from adapruner.verbs._compare import compare
    from adapruner.verbs._evaluate import Evaluation, evaluate
    from adapruner.verbs._export import export
    from adapruner.verbs._inspect import describe, inspect
    from adapruner.verbs._model import benchmark, load, load_tokenizer
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

# Imported when first used: inspecting a model needs none of the libraries for searching, training and tasks.
_MODULES = {
    "compare": "._compare",
    **dict.fromkeys(("Evaluation", "evaluate"), "._evaluate"),
    **dict.fromkeys(("Estimate", "estimate"), "adapruner.run.preview"),
    "export": "._export",
    **dict.fromkeys(("describe", "inspect"), "._inspect"),
    **dict.fromkeys(("benchmark", "load", "load_tokenizer"), "._model"),
    "recover": "._recover",
    "write_reports": "._report",
    **dict.fromkeys(("compensate", "cut", "make_windows", "measure", "plan", "score"), "._steps"),
    **dict.fromkeys(("PrunedVocabulary", "vocabulary"), "._vocabulary"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
