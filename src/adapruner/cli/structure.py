"""The verb that shows what of a model can be pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import yaml
from cyclopts import Parameter
from rich.table import Table

from adapruner.cli._options import Flag, Json, Model, PruneOptions
from adapruner.cli._output import plain_console, print_json, starting, table_of_memory
from adapruner.errors import AdaPrunerError

if TYPE_CHECKING:
    from adapruner.models import Architecture
    from adapruner.run.preview import Estimate
    from adapruner.structure import Structure


def inspect(
    model: Model,
    /,
    *,
    cost: Flag = False,
    architecture: Flag = False,
    options: Annotated[PruneOptions | None, Parameter(name="*")] = None,
    json: Json = False,
) -> None:
    """List the prunable parts of a model, or estimate its memory use (--cost). Does not load weights.

    Args:
        architecture: Print how the family of the model is built, as YAML that --architectures reads.
        cost: Print the memory that adapruner prune needs with the options that follow, stage by stage.
    """
    given = options.model_dump(exclude_unset=True) if options else {}
    if given and not cost:
        raise AdaPrunerError("pruning options are used with `cost` only")
    from adapruner import verbs

    if cost:
        with starting():
            from adapruner.run.preview import estimate
        _print_cost(estimate(model, **given), model, json)
    elif architecture:
        with starting():
            described = verbs.describe(model)
        _print_architecture(described, json)
    else:
        with starting():
            structure = verbs.inspect(model)
        _print_structure(structure, model, json)


def _print_architecture(architecture: Architecture, json: bool) -> None:
    content = architecture.model_dump(mode="json", exclude_defaults=True)
    if json:
        print_json(content)
    else:
        plain_console().print(
            yaml.safe_dump(content, sort_keys=False, default_flow_style=None).rstrip(), soft_wrap=True
        )


def _print_structure(structure: Structure, model: str, json: bool) -> None:
    if json:
        names = ("layer", "kind", "groups", "parameters_per_group")
        print_json(
            {
                "model": model,
                "model_type": structure.model_type,
                "parameters": structure.total_parameters,
                "parts": structure.parts,
                "removable_parameters": structure.removable_parameters,
                "blocks": [{name: getattr(block, name) for name in names} for block in structure.blocks],
                "whole_mixers": structure.whole_mixers,
            }
        )
        return
    total, console = structure.total_parameters, plain_console()
    console.print(f"{model}: {structure.model_type}, {total:,} parameters", soft_wrap=True)
    console.print(_table_of_parts(structure), _table_of_layers(structure), sep="\n")
    console.print(
        f"At most {structure.removable_parameters / total:.1%} of the parameters can be removed while every layer keeps"
        " some groups of each kind and all tokens are kept."
    )


def _table_of_parts(structure: Structure) -> Table:
    """How many parameters each part of a model has; without parts that it lacks."""
    table = Table("part", "parameters", "share")
    for part, parameters in structure.parts.items():
        if parameters:
            table.add_row(part, f"{parameters:,}", f"{parameters / structure.total_parameters:.1%}")
    return table


def _table_of_layers(structure: Structure) -> Table:
    """What can be removed of every layer; layers that are alike share a row."""
    from adapruner.structure import show_layers

    alike: dict[tuple[str, int, int], list[int]] = {}
    for block in structure.blocks:
        alike.setdefault((block.kind, block.groups, block.parameters_per_group), []).append(block.layer)
    table = Table("layers", "kind", "groups in each", "parameters per group", "share", caption_justify="left")
    for (kind, groups, parameters), layers in alike.items():
        share = len(layers) * groups * parameters / structure.total_parameters
        name = "KV groups" if kind == "heads" else kind
        table.add_row(show_layers(layers), name, f"{groups:,}", f"{parameters:,}", f"{share:.1%}")
    table.caption = structure.note or None
    return table


def _print_cost(estimate: Estimate, model: str, json: bool) -> None:
    if json:
        stages = [
            {"stage": stage, "device_bytes": memory.device, "host_bytes": memory.host, "largest": memory.largest}
            for stage, memory in estimate.stages.items()
        ]
        place = estimate.placement
        about = {"model": model, "device": place.device, "layer_wise": place.layer_wise}
        print_json({**about, "stages": stages})
        return
    console = plain_console()
    console.print(model, soft_wrap=True)
    console.print(table_of_memory(estimate.stages, estimate.placement.device, estimate.placement.layer_wise))
