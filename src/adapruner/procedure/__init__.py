"""The whole procedure: every artifact of a run, how it is made and from what, from windows of text to the report.

The modules, in the order in which their artifacts are made: `_windows`, `_statistics`, `_search`, `_model`,
`_evaluation`, `_result`.
"""

from __future__ import annotations

from typing import Any

from adapruner.artifacts import Artifact
from adapruner.procedure._evaluation import breakage, continuations, perplexity, scores
from adapruner.procedure._model import compensated, latencies, model, recovered, target, training_windows
from adapruner.procedure._result import report, result
from adapruner.procedure._search import candidate_at_ratio, levelled, plan, search, whole
from adapruner.procedure._statistics import moments, statistics
from adapruner.procedure._windows import (
    leave_out_broken_windows,
    report_texts,
    report_texts_dense,
    self_written,
    vocabulary,
    windows,
)

__all__ = [
    "ARTIFACTS",
    "candidate_at_ratio",
    "leave_out_broken_windows",
    "model",
    "moments",
    "plan",
    "report",
    "result",
    "search",
    "windows",
]

# Every artifact stands behind its inputs. Latencies come first: whoever runs trials reads them in the run folder.
ARTIFACTS: tuple[Artifact[Any], ...] = (
    latencies,
    *(vocabulary, windows, report_texts, report_texts_dense),
    *(self_written, moments, statistics, whole, search, levelled, plan, compensated, model),
    *(target, training_windows, recovered),
    *perplexity.values(),
    *scores.values(),
    continuations,
    *breakage.values(),
    *(result, report),
)
