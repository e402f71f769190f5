"""The graph of a run; the other modules declare its nodes."""

from __future__ import annotations

from adapruner.config import PruneConfig
from adapruner.graph.declaring import Graph

GRAPH = Graph(
    PruneConfig,
    given=("reporter", "run_folder", "stage_costs"),
    unkeyed=("config",),
)
