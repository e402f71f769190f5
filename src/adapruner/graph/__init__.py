"""The engine of a run: nodes that name what they need, the keys of what is kept, and a folder that holds it.

It knows no node of a run; `adapruner.run.nodes` declares them.
"""

from adapruner.graph.declaring import Graph, GraphError, InMemory, Kept, Leaf, Node
from adapruner.graph.folder import RunFolder
from adapruner.graph.making import Making, make_all, refuse_outdated
from adapruner.graph.records import Form, Record

__all__ = [
    "Form",
    "Graph",
    "GraphError",
    "InMemory",
    "Kept",
    "Leaf",
    "Making",
    "Node",
    "Record",
    "RunFolder",
    "make_all",
    "refuse_outdated",
]
