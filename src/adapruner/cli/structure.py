"""The verb that lists the prunable parts of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from cyclopts import Parameter
from rich.console import RenderableType
from rich.table import Table

from adapruner.cli._options import Flag, Json, Model, PruneOptions, given
from adapruner.cli._output import memory_line, print_output, starting, where
from adapruner.errors import AdaPrunerError

if TYPE_CHECKING:
    from adapruner.run.preview import Estimate
    from adapruner.structure._blocks import Structure


def inspect(
    model: Model,
    /,
    *,
    cost: Flag = False,
    memory: str | None = None,
    architecture: Flag = False,
    options: Annotated[PruneOptions | None, Parameter(name="*")] = None,
    json: Json = False,
) -> None:
    """List the prunable parts of a model, or estimate its memory use (--cost). Does not load weights.

    With --architectures, check a file that describes the family of the model.

    ```console
    adapruner inspect Qwen/Qwen3-0.6B
    adapruner inspect Qwen/Qwen3-8B --cost --memory 24GB
    adapruner inspect allenai/OLMo-1B-hf --architectures olmo.yaml
    ```

    Args:
        architecture: Print how the family of the model is built, as YAML that --architectures reads.
        cost: Print the memory that adapruner prune needs with the options that follow: weights, the largest term
            beside them, and whether it fits.
        memory: Memory of the GPUs instead of that of this machine, for --cost, as 24GB or 4x80GB.
    """
    pruning = given(options)
    if memory and not cost:
        raise AdaPrunerError("`memory` is used with `cost` only")
    if pruning.keys() - {"architectures"} and not cost:
        raise AdaPrunerError("pruning options other than `architectures` are used with `cost` only")
    if cost:
        with starting():
            from adapruner.cli import with_options
            from adapruner.run.preview import estimate
        estimated = estimate(model, memory, **pruning)
        place, needed = estimated.placement, estimated.memory
        content = {
            "model": model,
            "device": place.device,
            "layer_wise": place.layer_wise,
            "fits": estimated.fits,
            "refusal": estimated.refusal,
            "weights_bytes": needed.weights,
            "term_bytes": needed.term,
            "largest": needed.largest,
            "device_bytes": needed.device,
            "host_bytes": needed.host,
        }
        lines = memory_line(needed, place.device), f"{model} {_verdict(estimated, memory)}"
        print_output(content, json, map(with_options, lines))
    elif architecture:
        with starting():
            from adapruner.verbs._inspect import describe

            content = describe(model).model_dump(mode="json", exclude_defaults=True)
        print_output(content, json, [yaml.safe_dump(content, sort_keys=False, default_flow_style=None).rstrip()])
    else:
        with starting():
            from adapruner.verbs._inspect import check_described, inspect as read_structure, multimodal

            if architectures := pruning.get("architectures"):
                check_described(model, architectures)
            structure, around = read_structure(model), multimodal(model)
        print_output(_content(structure, model, around), json, _lines(structure, model, around))


def _content(structure: Structure, model: str, around: tuple[str, int] | None) -> dict[str, Any]:
    names = ("layer", "kind", "groups", "parameters_per_group")
    return {
        "model": model,
        "model_type": structure.model_type,
        "parameters": structure.total_parameters,
        "parts": structure.parts,
        "removable_parameters": structure.removable_parameters,
        "blocks": [{name: getattr(block, name) for name in names} for block in structure.blocks],
        "whole_mixers": structure.whole_mixers,
        "multimodal": around and dict(zip(("model_type", "parameters"), around, strict=True)),
    }


def _lines(structure: Structure, model: str, around: tuple[str, int] | None) -> Iterator[RenderableType]:
    from adapruner.structure._blocks import show_layers

    total = structure.total_parameters
    yield f"{model}: {structure.model_type}, {total:,} parameters"
    if around:
        yield (
            f"It is the decoder of a {around[0]}, with {total / around[1]:.1%} of its {around[1]:,} parameters; all"
            " other parts are kept as they are. Ratios are of all parameters, or with --ratio-of decoder of its own."
        )
    parts = Table("part", "parameters", "share")
    for part, parameters in structure.parts.items():
        if parameters:
            parts.add_row(part, f"{parameters:,}", f"{parameters / total:.1%}")
    yield parts
    # Equal layers share a row.
    layers_by_size: dict[tuple[str, int, int], list[int]] = {}
    for block in structure.blocks:
        layers_by_size.setdefault((block.kind, block.groups, block.parameters_per_group), []).append(block.layer)
    groups_table = Table("layers", "kind", "groups in each", "parameters per group", "share", caption_justify="left")
    for (kind, groups, parameters), layers in layers_by_size.items():
        share = len(layers) * groups * parameters / total
        name = "KV groups" if kind == "heads" else kind
        groups_table.add_row(show_layers(layers), name, f"{groups:,}", f"{parameters:,}", f"{share:.1%}")
    groups_table.caption = structure.note or None
    yield groups_table
    yield (
        f"At most {structure.removable_parameters / total:.1%} of the parameters can be removed while every layer keeps"
        " some groups of each kind and all tokens are kept."
    )


def _verdict(estimate: Estimate, memory: str | None) -> str:
    """A line that says if the run fits into the stated memory, or into that of this machine."""
    place, room = estimate.placement, memory or "this machine"
    if estimate.fits is None:
        return "fits: unknown, as no GPU is here; state its memory, as --memory 24GB"
    if not estimate.fits:
        return f"fits {room}: no. {estimate.refusal}"
    return f"fits {room}: yes, {where(place.device, place.layer_wise)}"
