"""The verbs on the installation: doctor, and the recipes of the package."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App
from rich.table import Table

from adapruner import recipe
from adapruner.cli._options import Device, Dtype, Flag, Json, Model
from adapruner.cli._output import plain_console, print_advice, print_output, starting
from adapruner.errors import AdaPrunerError
from adapruner.files import write_text
from adapruner.paths import output_path

if TYPE_CHECKING:
    from adapruner.doctor import Comparison, Diagnosis


def doctor(
    model: Model = "smollm2",
    /,
    *,
    benchmark: Flag = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Print versions, devices, data folders and engines, and check an accelerator against the CPU on request.

    Paste the output into an issue.

    ```console
    adapruner doctor
    adapruner doctor --benchmark
    adapruner doctor --json
    ```

    Args:
        benchmark: Prune the model twice with little text, on the CPU and on the accelerator, and compare; some minutes.
    """
    with starting():
        from adapruner.doctor import diagnose

    diagnosis = diagnose(model, benchmark, dtype, device)
    print_output(diagnosis, json, _tables(diagnosis))
    if benchmark and not diagnosis.comparison and not json:
        print_advice(["PyTorch finds no accelerator here: there is nothing to compare with the CPU"])


def _tables(diagnosis: Diagnosis) -> Iterator[Table]:
    from adapruner.doctor import EXTRAS

    extras = {package: f" (extra {extra})" for extra, package in EXTRAS.items()}
    table = Table("", "", show_header=False)
    table.add_row("python", f"{diagnosis.python}, {diagnosis.platform}")
    for name, version in diagnosis.packages.items():
        table.add_row(name, f"{version or 'not installed'}{extras.get(name, '')}")
    for device in diagnosis.devices:
        memory = f", {device.memory / 2**30:.1f} GiB" if device.memory else ""
        bfloat16 = "native" if device.native_bfloat16 else "emulated"
        table.add_row("device", f"{device.name}{memory}, bfloat16 {bfloat16}")
    table.add_row("Hub", f"{diagnosis.hub_cache}{', offline' if diagnosis.offline else ''}")
    for folder, exists in diagnosis.data.items():
        table.add_row("data", folder if exists else f"{folder} does not exist")
    table.add_row("engines", ", ".join(name for name, installed in diagnosis.engines.items() if installed) or "none")
    yield table
    if diagnosis.comparison:
        yield _table_of_comparison(diagnosis.comparison)


def _table_of_comparison(comparison: Comparison) -> Table:
    """A small run on the CPU and on the accelerator, stage by stage."""
    cpu, accelerator = comparison.cpu, comparison.accelerator
    table = Table("", "CPU", "accelerator", "peak, MiB", "estimated, MiB", caption_justify="left")
    for name, cost in cpu.stages.items():
        measured, estimated = accelerator.stages.get(name), accelerator.estimated.get(name)
        table.add_row(
            f"{name}, s",
            f"{cost.seconds:.1f}",
            f"{measured.seconds:.1f}" if measured else "",
            f"{measured.peak_on_accelerator_mib:,}" if measured else "",
            f"{estimated / 2**20:,.0f}" if estimated else "",
        )
    table.add_row("loss of the chosen trial", f"{cpu.loss:.4f}", f"{accelerator.loss:.4f}")
    for role, value in cpu.perplexity.items():
        table.add_row(f"perplexity, {role}", f"{value:.3f}", f"{accelerator.perplexity[role]:.3f}")
    table.add_row("plan", cpu.plan[:12], accelerator.plan[:12])
    table.caption = f"{comparison.same_groups:.2%} of the groups kept on the CPU are kept on the accelerator too"
    return table


recipes = App(name="recipes", help="List the recipes of the package, or copy one to edit it.")


@recipes.default
def list_recipes(*, json: Json = False) -> None:
    """List the recipes of the package: options for adapruner prune --recipe NAME.

    ```console
    adapruner recipes
    adapruner recipes copy smollm2-20 mine.yaml
    adapruner prune --recipe mine.yaml -o runs/mine
    ```
    """
    purposes = {name: _purpose(text) for name, text in recipe.recipes().items()}
    table = Table("recipe", "", show_lines=True)
    for name, purpose in purposes.items():
        table.add_row(name, purpose)
    print_output(purposes, json, [table])


@recipes.command(name="copy")
def copy_recipe(name: str, file: Path | None = None, /, *, overwrite: Flag = False) -> None:
    """Write a recipe of the package to a file, to edit it.

    ```console
    adapruner recipes copy qwen3-8b
    adapruner recipes copy qwen3-8b mine.yaml
    adapruner recipes copy qwen3-8b mine.yaml --overwrite
    ```

    Args:
        name: A recipe of the list.
        file: The file to write, by default NAME.yaml in the current folder.
        overwrite: Replace an existing file.
    """
    known = recipe.recipes()
    if name not in known:
        raise AdaPrunerError(f"no recipe {name!r}: the package has {', '.join(known)}")
    target = output_path(file or f"{name}.yaml")
    if target.exists() and not overwrite:
        raise AdaPrunerError(f"{target} exists: name another file, or replace it with `overwrite`")
    write_text(target, known[name])
    plain_console().print(f"{target}: adapruner prune --recipe {target}", soft_wrap=True)


def _purpose(recipe: str) -> str:
    """The first sentence of the comment that a recipe begins with, after the command."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), recipe.splitlines()[1:])
    return " ".join(line.removeprefix("#").strip() for line in lines).strip().partition(": ")[0]
