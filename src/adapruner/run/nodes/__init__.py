"""The whole procedure: every node of a run, each after what it needs, from the model's files to the report."""

from __future__ import annotations

# A node is declared after those that it names: the order of these lines is that of the procedure.
# isort: off
from adapruner.run.nodes.declared import GRAPH
from adapruner.run.nodes import inputs as inputs
from adapruner.run.nodes import text as text
from adapruner.run.nodes import chosen as chosen
from adapruner.run.nodes import models as models
from adapruner.run.nodes import evaluated as evaluated
# isort: on

GRAPH.check()
