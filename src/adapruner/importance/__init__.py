"""From statistics to scores: the importance terms and how a metric point mixes them."""

from adapruner.importance._metric import (
    ACTIVATION_METRICS,
    LLM_PRUNER_METRICS,
    Alignment,
    MetricPoint,
    Reduction,
    score_groups,
)
from adapruner.importance._terms import TERMS, Term

__all__ = [
    "ACTIVATION_METRICS",
    "LLM_PRUNER_METRICS",
    "TERMS",
    "Alignment",
    "MetricPoint",
    "Reduction",
    "Term",
    "score_groups",
]
