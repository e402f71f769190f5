"""adapruner inspect"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from adapruner.cli._output import plain_console, print_json
from adapruner.config import PruneOptions
from adapruner.errors import AdaPrunerError

if TYPE_CHECKING:
    from adapruner.structure import Structure
    from adapruner.verbs import Estimate

_GIB = 2**30


def inspect(
    model: str,
    /,
    *,
    cost: Annotated[bool, Parameter(negative="")] = False,
    options: Annotated[PruneOptions | None, Parameter(name="*")] = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """List the prunable parts of a model, or estimate its memory use (--cost). Does not load weights.

    Parameters
    ----------
    model:
        Hub id, model folder, .gguf file, or smollm2.
    cost:
        Print the memory that adapruner prune needs with the options that follow, stage by stage.
    json:
        Print JSON on stdout instead of the table.
    """
    from adapruner import verbs

    given = options.model_dump(exclude_unset=True) if options else {}
    if cost:
        _print_cost(verbs.estimate(model, **given), model, json)
        return
    if given:
        raise AdaPrunerError("pruning options are used with `cost` only")
    _print_structure(verbs.inspect(model), model, json)


def _print_structure(structure: Structure, model: str, json: bool) -> None:
    if json:
        names = ("layer", "kind", "groups", "parameters_per_group")
        blocks = [{name: getattr(block, name) for name in names} for block in structure.blocks]
        print_json(
            {
                "model": model,
                "model_type": structure.model_type,
                "parameters": structure.total_parameters,
                "blocks": blocks,
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


def _print_cost(estimate: Estimate, model: str, json: bool) -> None:

    if json:
        stages = [
            {"stage": stage, "device_bytes": memory.device, "host_bytes": memory.host, "largest": memory.largest}
            for stage, memory in estimate.stages.items()
        ]
        print_json(
            {"model": model, "device": str(estimate.device), "layer_wise": estimate.layer_wise, "stages": stages}
        )
        return
    how = "one layer at a time in memory" if estimate.layer_wise else "all layers in memory"
    table = Table("stage", f"GiB on {estimate.device}", "GiB beside it", "largest term", title=f"{model}: {how}")
    for stage, memory in estimate.stages.items():
        host = f"{memory.host / _GIB:.2f}" if memory.host else ""
        table.add_row(stage, f"{memory.device / _GIB:.2f}", host, memory.largest)
    plain_console().print(table)
