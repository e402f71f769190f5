"""The engine of a run: nodes that name what they need, the keys of what is kept, and a folder that holds it.

It knows no node of a run; `adapruner.run.nodes` declares them.
"""

from adapruner.graph.declaring import Graph as Graph, GraphError as GraphError, Kept as Kept
from adapruner.graph.folder import RunFolder as RunFolder
from adapruner.graph.making import Making as Making
from adapruner.graph.records import Form as Form, Record as Record
