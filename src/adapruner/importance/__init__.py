"""From statistics to scores: the importance terms and how a metric point mixes them."""

from adapruner.importance._metric import ACTIVATION_METRICS, LLM_PRUNER_METRICS, MetricPoint, score_groups
from adapruner.importance._terms import (
    PAPER_TERMS,
    TERMS,
    Term,
    needs_moments,
    needs_removal_errors,
    register_term,
    usable_terms,
)

__all__ = [
    "ACTIVATION_METRICS",
    "LLM_PRUNER_METRICS",
    "PAPER_TERMS",
    "TERMS",
    "MetricPoint",
    "Term",
    "needs_moments",
    "needs_removal_errors",
    "register_term",
    "score_groups",
    "usable_terms",
]
