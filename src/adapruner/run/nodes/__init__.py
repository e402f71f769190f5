"""The whole procedure: every node of a run, each after what it needs, from the model's files to the report.

The modules in this order: `inputs`, `text`, `measured`, `chosen`, `models`, `evaluated`, `result`.
"""

from __future__ import annotations

from adapruner.run.nodes import (
    chosen as chosen,
    evaluated as evaluated,
    inputs as inputs,
    measured as measured,
    models as models,
    result as result,
    text as text,
)
from adapruner.run.nodes.declared import GRAPH as GRAPH

GRAPH.check()
