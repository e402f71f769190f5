"""From statistics to scores: the importance terms and how a metric point mixes them."""

from adapruner.importance._metric import (
    ACTIVATION_METRICS as ACTIVATION_METRICS,
    LLM_PRUNER_METRICS as LLM_PRUNER_METRICS,
    MetricPoint as MetricPoint,
    score_groups as score_groups,
)
from adapruner.importance._terms import (
    PAPER_TERMS as PAPER_TERMS,
    TERMS as TERMS,
    Term as Term,
    needs_moments as needs_moments,
    needs_removal_errors as needs_removal_errors,
    register_term as register_term,
    usable_terms as usable_terms,
)
