"""The whole procedure: every node of a run, each after what it needs, from the model's files to the report.

The modules in this order: `inputs`, `text`, `measured`, `chosen`, `models`, `evaluated`, `result`.
"""

from __future__ import annotations

from adapruner.run.nodes import inputs, text, measured, chosen, models, evaluated, result  # isort: skip
from adapruner.run.nodes.declared import GRAPH

__all__ = ["GRAPH", "chosen", "evaluated", "inputs", "measured", "models", "result", "text"]

GRAPH.check()
