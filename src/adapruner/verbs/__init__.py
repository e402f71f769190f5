"""Operations on one model, dense or pruned, outside of a pruning run; and the report of a run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# The module of every name, imported when the name is first used: inspecting a model needs none of the libraries for
# searching, training and tasks.
_MODULES = {
    name: module
    for module, names in {
        "adapruner.run.preview": "Estimate estimate",
        "adapruner.verbs._evaluate": "Evaluation evaluate",
        "adapruner.verbs._export": "export",
        "adapruner.verbs._inspect": "check_described describe inspect multimodal",
        "adapruner.verbs._model": "benchmark load load_tokenizer",
        "adapruner.verbs._recover": "recover",
        "adapruner.verbs._report": "write_reports",
        "adapruner.verbs._steps": "compensate cut make_windows measure plan score",
        "adapruner.verbs._vocabulary": "PrunedVocabulary vocabulary",
    }.items()
    for name in names.split()
}

if TYPE_CHECKING:
    from adapruner.run.preview import Estimate as Estimate, estimate as estimate
    from adapruner.verbs._evaluate import Evaluation as Evaluation, evaluate as evaluate
    from adapruner.verbs._export import export as export
    from adapruner.verbs._inspect import (
        check_described as check_described,
        describe as describe,
        inspect as inspect,
        multimodal as multimodal,
    )
    from adapruner.verbs._model import benchmark as benchmark, load as load, load_tokenizer as load_tokenizer
    from adapruner.verbs._recover import recover as recover
    from adapruner.verbs._report import write_reports as write_reports
    from adapruner.verbs._steps import (
        compensate as compensate,
        cut as cut,
        make_windows as make_windows,
        measure as measure,
        plan as plan,
        score as score,
    )
    from adapruner.verbs._vocabulary import PrunedVocabulary as PrunedVocabulary, vocabulary as vocabulary


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
