"""The verbs on the installation: its versions and devices, and the recipes of the package."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from cyclopts import App
from rich.table import Table

from adapruner import __version__, recipes as recipe
from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import output_path, write_text
from adapruner.cli.shared import Flag, Json, plain_console, print_output, starting


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
