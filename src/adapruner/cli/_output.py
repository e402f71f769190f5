"""Results on stdout, for people or as JSON, and advice on stderr."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from adapruner.result import PruneResult


def plain_console(stderr: bool = False) -> Console:
    """A console that shows text as it is: names of models, files and texts may look like markup or emoji."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_result(result: PruneResult) -> None:
    """Prints the tables of a run, and where its model is."""
    console = plain_console()
    console.print(*result.tables(), sep="\n")
    console.print(
        f"model: {result.model_folder}   plan {result.plan.hash[:12]}   report {result.report}", soft_wrap=True
    )


def print_json(content: Any) -> None:
    """Prints indented JSON; everything for people goes to stderr or is a table."""
    print(json.dumps(content, indent=2))


def print_advice(lines: list[str]) -> None:
    """Prints what should not go unseen, on stderr."""
    for line in lines:
        plain_console(stderr=True).print(f"adapruner: {line}", style="yellow", soft_wrap=True)
