"""From statistics to scores: the importance terms and how a metric point mixes them."""

from adapruner.importance._metric import (
    LLM_PRUNER_METRICS as LLM_PRUNER_METRICS,
    MetricPoint as MetricPoint,
    score_groups as score_groups,
)
from adapruner.importance._terms import Term as Term, register_term as register_term
