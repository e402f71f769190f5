"""adapruner inspect"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from adapruner import verbs
from adapruner.cli._output import print_json


def inspect(model: str, /, *, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """What of a model can be pruned; reads no weights.

    Parameters
    ----------
    model:
        Hub id, model folder, .gguf file, or smollm2.
    json:
        Print JSON on stdout instead of the table.
    """
    structure = verbs.inspect(model)
    if json:
        print_json(
            {
                "model": model,
                "model_type": structure.model_type,
                "parameters": structure.total_parameters,
                "blocks": [
                    {
                        "layer": block.layer,
                        "kind": block.kind,
                        "groups": block.groups,
                        "parameters_per_group": block.parameters_per_group,
                    }
                    for block in structure.blocks
                ],
            }
        )
        return
    table = Table("layer", "kind", "groups", "parameters per group", "share of the model")
    table.title = f"{model}: {structure.model_type}, {structure.total_parameters:,} parameters"
    for block in structure.blocks:
        parameters = block.groups * block.parameters_per_group
        kind = "KV groups" if block.kind == "heads" else "channels"
        table.add_row(
            str(block.layer),
            kind,
            f"{block.groups:,}",
            f"{block.parameters_per_group:,}",
            f"{parameters / structure.total_parameters:.2%}",
        )
    Console().print(table)
