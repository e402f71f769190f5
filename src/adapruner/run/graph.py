"""The graph of a run, and the forms that several of its artifacts have.

The nodes are declared in `inputs`, `texts`, `choice`, `models` and `evaluation`, in this order: each takes the graph
from the module before it.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapruner.graph.nodes import Form, Graph
from adapruner.options import PruneConfig

Windows = dict[str, Tensor]
TENSORS: Form[Windows] = Form(save_file, load_file)

GRAPH = Graph(PruneConfig, given=("reporter", "run_folder", "stage_costs"), unkeyed=("config",))


def json_form(content: Any) -> Form[Any]:
    """Values of a type that pydantic knows, as JSON."""
    adapter: TypeAdapter[Any] = TypeAdapter(content)
    return Form(
        lambda value, path: path.write_bytes(adapter.dump_json(value, indent=2) + b"\n"),
        lambda path: adapter.validate_json(path.read_bytes()),
    )
