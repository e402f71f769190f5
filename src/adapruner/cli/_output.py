"""Results on stdout, as tables or as JSON, and advice on stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from adapruner.result import PruneResult


# What a shell reports of a process that SIGPIPE ended.
CLOSED_OUTPUT = 141


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Ends as other tools do if the reader of stdout has ended; rich drops the output, but exits with code 1. What
        nobody reads on stderr is dropped, and the command continues."""
        if self.stderr:
            return
        try:
            super().on_broken_pipe()
        finally:
            sys.exit(CLOSED_OUTPUT)


def plain_console(stderr: bool = False) -> Console:
    """A console that shows text as it is: names of models, files and datasets may look like markup or emoji."""
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_result(results: list[PruneResult]) -> None:
    """Prints the tables of a run, and the path of its model, for every ratio."""
    console = plain_console()
    for result in results:
        console.print(*result.tables(), sep="\n")
        console.print(
            f"model: {result.model_folder}   plan {result.plan.hash[:12]}   report {result.report}", soft_wrap=True
        )


def print_json(content: Any) -> None:
    """Prints indented JSON on stdout, where nothing else is printed."""
    plain_console().print(json.dumps(content, indent=2), soft_wrap=True)


def print_advice(lines: list[str]) -> None:
    """Prints advice on stderr."""
    from adapruner.cli import with_options

    for line in lines:
        plain_console(stderr=True).print(f"adapruner: {with_options(line)}", style="yellow", soft_wrap=True)
