"""adapruner inspect"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from adapruner.cli._output import plain_console, print_json
from adapruner.config import PruneOptions
from adapruner.errors import AdaPrunerError

if TYPE_CHECKING:
    from adapruner.cost import Cost


def inspect(
    model: str,
    /,
    *,
    cost: Annotated[bool, Parameter(negative="")] = False,
    options: Annotated[PruneOptions | None, Parameter(name="*")] = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """What of a model can be pruned, or what pruning it takes; reads no weights.

    Parameters
    ----------
    model:
        Hub id, model folder, .gguf file, or smollm2.
    cost:
        Print the memory and the time that adapruner prune takes with the options that follow, stage by stage; runs a
        few layers with random weights for it.
    json:
        Print JSON on stdout instead of the table.
    """
    from adapruner import verbs

    given = options.model_dump(exclude_unset=True) if options else {}
    if cost:
        _print_cost(verbs.estimate(model, **given), model, json)
        return
    if given:
        raise AdaPrunerError("options of pruning only go with --cost")
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
    plain_console().print(table)


def _print_cost(cost: Cost, model: str, json: bool) -> None:
    from adapruner.cost import GIB

    seconds = cost.seconds or {}
    if json:
        print_json(
            {
                "model": model,
                "device": str(cost.device),
                "dtype": str(cost.dtype).removeprefix("torch."),
                "layer_wise": cost.layer_wise,
                "stages": [
                    {
                        "stage": stage,
                        "device_bytes": memory.device,
                        "host_bytes": memory.host,
                        "seconds": seconds.get(stage),
                    }
                    for stage, memory in cost.memory.items()
                ],
            }
        )
        return
    how = "one layer at a time in memory" if cost.layer_wise else "all layers in memory"
    table = Table("stage", f"GiB on {cost.device}", "GiB beside it", "seconds")
    table.title = f"{model} in {str(cost.dtype).removeprefix('torch.')}: {how}"
    for stage, memory in cost.memory.items():
        time = f"{seconds[stage]:,.0f}" if stage in seconds else ""
        table.add_row(stage, f"{memory.device / GIB:.2f}", f"{memory.host / GIB:.2f}" if memory.host else "", time)
    plain_console().print(table)
