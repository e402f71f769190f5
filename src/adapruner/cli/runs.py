"""The commands of a run, and on the installation: prune, report, inspect, recipes, env."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import textwrap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from cyclopts import Parameter
from rich.console import RenderableType
from rich.table import Table

from adapruner import __version__, options as config, recipes as recipe
from adapruner.base.errors import AdaPrunerError
from adapruner.cli.shared import (
    MOST_USED,
    RUN_FOLDER,
    Flag,
    Json,
    Model,
    PruneOptions,
    ShownInAll,
    SizeLimit,
    given,
    memory_line,
    print_advice,
    print_note,
    print_output,
    starting,
    where,
)
from adapruner.recipes import override, read_recipe

if TYPE_CHECKING:
    from adapruner.report.result import RunResult
    from adapruner.run.prune import Preview
    from adapruner.structure.blocks import Structure


def prune(
    model: Model | None = None,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], group=MOST_USED)] = None,
    recipe: Annotated[str | None, Parameter(group=MOST_USED)] = None,
    from_: Annotated[Path | None, Parameter(name="--from", group=MOST_USED)] = None,
    dry_run: Annotated[Flag, Parameter(group=MOST_USED)] = False,
    options: Annotated[PruneOptions | None, Parameter(name="*")] = None,
    size_limit: Annotated[SizeLimit | None, Parameter(name="*")] = None,
    overwrite: Annotated[Flag, ShownInAll, Parameter(group=RUN_FOLDER)] = False,
    json: Annotated[Json, Parameter(group=RUN_FOLDER)] = False,
) -> None:
    """Measure, prune, heal, save and evaluate. Rerun the same command to resume.

    ```console
    adapruner prune Qwen/Qwen3-0.6B -o runs/a --dry-run
    adapruner prune Qwen/Qwen3-0.6B --ratio 0.2 --for llama.cpp -o runs/a
    adapruner prune Qwen/Qwen3-8B --size 12GB --heal 1M --calibration mix,notes.txt:0.5
    adapruner prune --from runs/a --ratio 0.3 -o runs/b
    ```

    Args:
        output: Run folder; the pruned model is saved in model/. By default runs/MODEL-RATIO.
        recipe: Options to start from: a recipe that adapruner recipes lists, or a YAML file. Options of the command
            line override them; the model may be that of the recipe.
        from_: Folder of an earlier run, to prune with another ratio, layout or effort. Its options are those to start
            from, and its measurements are taken over; its search too if only the ratio differs.
        dry_run: Check the options and print the artifacts of the run, with sizes and memory; write nothing.
        overwrite: Rebuild artifacts of other options, another model or other text.
    """
    chosen = given(options) | given(size_limit)
    if output is None:
        if from_:
            raise AdaPrunerError("name the folder of the new run: `output`")
        output = _default_output(model, recipe, chosen)
        print_note(f"run folder: {output}")
    with starting():
        from adapruner.run import options as engines, prune as api, prune as preview
        from adapruner.run.folder import RunFolder
    if dry_run:
        previewed = preview.preview(model, output=output, overwrite=overwrite, recipe=recipe, from_=from_, **chosen)
        print_output(previewed, json, _lines_of_preview(previewed))
        return
    result = api.prune(model, output=output, overwrite=overwrite, recipe=recipe, from_=from_, **chosen)
    print_advice(result.advice())
    for_ = RunFolder(result.output).read_config().for_ or ("transformers",)  # `result.json` has those of the first call
    serving = engines.serving_commands(for_, result.model_folder)
    files = f"model: {result.model_folder}   plan {result.plan.hash[:12]}   report {result.report}"
    print_output(
        result.result,
        json,
        [result.summary(), *_answers(result.result), files, *(f"serve: {line}" for line in serving)],
    )


def _lines_of_preview(preview: Preview) -> Iterator[str]:
    """The artifacts that a run would make, with sizes and memory."""
    from adapruner.cli import with_options

    before, after = preview.parameters_before, preview.parameters_after
    yield f"about {after:,} of {before:,} parameters kept ({1 - after / before:.1%} removed)"
    yield f"to make: {', '.join(preview.missing) or 'nothing'}"
    yield f"on disk: model {preview.model_bytes / 1e6:,.1f} MB, moments {preview.moments_bytes / 1e6:,.1f} MB"
    if preview.memory:
        yield with_options(memory_line(preview.memory, preview.device))
        yield where(preview.device, preview.layer_wise)


def _answers(result: RunResult) -> Iterator[str]:
    """The first text that each model wrote; the report has them all."""
    for prompt in [*result.final.abilities.writes][:1]:
        yield f"asked: {prompt}"
        for model in result.models:
            yield f"{model.role}: {textwrap.shorten(model.abilities.writes.get(prompt, ''), 110, placeholder=' …')}"


def _default_output(model: str | None, recipe: str | None, options: dict[str, object]) -> Path:
    """`runs/MODEL-RATIO`, or with a size in place of the ratio; MODEL is the last part of the name of the model."""
    chosen = override(read_recipe(recipe) if recipe else {}, options)
    if not (model := model or chosen.get("model")):
        raise AdaPrunerError("name a model: Hub id, model folder, .gguf file, or smollm2")
    name = Path(str(model)).resolve().name.removesuffix(".gguf")
    limits = config.SizeLimit.from_options(**{key: chosen[key] for key in chosen if key in ("size", "memory")})
    ratio = config.PruneOptions.from_options(**{key: chosen[key] for key in chosen if key == "ratio"}).ratio
    return Path("runs", f"{name}-{limits.size or limits.memory or format(ratio, 'g')}")


def report(run: Path, /, *, json: Json = False) -> None:
    """Write the report of a finished run, a self-contained page: report.html in the run folder.

    ```console
    adapruner report runs/a
    ```

    Args:
        run: Folder of a finished run.
    """
    with starting():
        from adapruner.base.files import given_path
        from adapruner.run.folder import RunFolder, write_report
        from adapruner.run.options import register_extensions

    folder = RunFolder(given_path(run))
    register_extensions(folder.read_config())
    page = write_report(folder)
    print_output({"run": run, "report": page}, json, [f"report: {page}"])


def inspect(
    model: Model,
    /,
    *,
    cost: Flag = False,
    gpu_memory: str | None = None,
    architecture: Flag = False,
    options: Annotated[PruneOptions | None, Parameter(name="*")] = None,
    json: Json = False,
) -> None:
    """List the prunable parts of a model, or estimate its memory use (--cost). Does not load weights.

    With --architectures, check a file that describes the family of the model.

    ```console
    adapruner inspect Qwen/Qwen3-0.6B
    adapruner inspect Qwen/Qwen3-8B --cost --gpu-memory 24GB
    adapruner inspect allenai/OLMo-1B-hf --architectures olmo.yaml
    ```

    Args:
        architecture: Print how the family of the model is built, as YAML that --architectures reads.
        cost: Print the memory that adapruner prune needs with the options that follow: weights, the largest term
            beside them, and whether it fits.
        gpu_memory: Memory of the GPUs instead of that of this machine, for --cost, as 24GB or 4x80GB.
    """
    pruning = given(options)
    if gpu_memory and not cost:
        raise AdaPrunerError("`gpu_memory` is used with `cost` only")
    if pruning.keys() - {"architectures"} and not cost:
        raise AdaPrunerError("pruning options other than `architectures` are used with `cost` only")
    if cost:
        with starting():
            from adapruner.cli import with_options
            from adapruner.run.prune import estimate
        estimated = estimate(model, gpu_memory, **pruning)
        place, needed = estimated.placement, estimated.memory
        content = {"model": model, "device": place.device, "layer_wise": place.layer_wise}
        content |= {"fits": estimated.fits, "refusal": estimated.refusal, "largest": needed.largest}
        content |= {f"{term}_bytes": getattr(needed, term) for term in ("weights", "term", "device", "host")}
        room = gpu_memory or "this machine"
        if estimated.fits is None:
            verdict = "fits: unknown, as no GPU is here; state its memory, as --gpu-memory 24GB"
        elif estimated.fits:
            verdict = f"fits {room}: yes, {where(place.device, place.layer_wise)}"
        else:
            verdict = f"fits {room}: no. {estimated.refusal}"
        lines = memory_line(needed, place.device), f"{model} {verdict}"
        print_output(content, json, map(with_options, lines))
    elif architecture:
        with starting():
            from adapruner.run.steps import describe

            content = describe(model).model_dump(mode="json", exclude_defaults=True)
        print_output(content, json, [yaml.safe_dump(content, sort_keys=False, default_flow_style=None).rstrip()])
    else:
        with starting():
            from adapruner.run.steps import check_described, inspect as read_structure, multimodal

            if architectures := pruning.get("architectures"):
                check_described(model, architectures)
            structure, around = read_structure(model), multimodal(model)
        print_output(_content(structure, model, around), json, _lines(structure, model, around))


def _content(structure: Structure, model: str, around: tuple[str, int] | None) -> dict[str, object]:
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
    from adapruner.structure.blocks import show_layers

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
    of_tokens = structure.parts["embedding"] / total
    yield (
        f"Of the parameters, {of_tokens:.1%} are rows of tokens: half of the tokens are {of_tokens / 2:.1%} of all."
        " --vocabulary-size N keeps the N that code and English need most, --vocabulary TEXT those of a text:"
        " where no other token occurs, nothing is lost."
    )


def env(*, json: Json = False) -> None:
    """Print versions and devices, to paste into an issue.

    ```console
    adapruner env
    adapruner env --json
    ```
    """
    with starting():
        import torch

        from adapruner.model.loading import describe_device
    packages: dict[str, str | None] = {}
    for requirement in requires("adapruner") or []:
        name = re.split(r"[^\w.-]", requirement)[0]
        if not re.search(r"extra == .(dev|docs)", requirement):
            with contextlib.suppress(PackageNotFoundError):  # of an extra that is not installed
                packages[name] = None
                packages[name] = version(name)
    accelerator = torch.accelerator.current_accelerator()
    found = [torch.device(str(accelerator), number) for number in range(torch.accelerator.device_count())]
    content: dict[str, Any] = {
        "adapruner": __version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "packages": packages,
        "devices": [f"{describe_device(torch.device('cpu'))}, {os.cpu_count()} cores", *map(describe_device, found)],
    }
    table = Table("", "", show_header=False)
    for name in ("adapruner", "python"):
        table.add_row(name, content[name])
    for name, installed in packages.items():
        table.add_row(name, installed or "not installed")
    for device in content["devices"]:
        table.add_row("device", device)
    print_output(content, json, [table])


def recipes(name: str | None = None, /, *, json: Json = False) -> None:
    """List the recipes of the package, options for adapruner prune and recover --recipe NAME, or print one to edit it.

    ```console
    adapruner recipes
    adapruner recipes smollm2-20 > mine.yaml
    adapruner prune --recipe mine.yaml -o runs/mine
    ```

    Args:
        name: A recipe of the list.
    """
    known = recipe.recipes()
    if name is not None and name not in known:
        raise AdaPrunerError(f"no recipe {name!r}: the package has {', '.join(known)}")
    if name is not None:
        print_output(read_recipe(name), json, [known[name].rstrip()])
        return
    purposes = {}
    for own, text in known.items():
        # The first sentence of the comment, after the command.
        lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()[1:])
        purposes[own] = " ".join(line.removeprefix("#").strip() for line in lines).strip().partition(": ")[0]
    table = Table("recipe", "", show_lines=True)
    for own, purpose in purposes.items():
        table.add_row(own, purpose)
    print_output(purposes, json, [table])
