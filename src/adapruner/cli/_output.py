"""Results on stdout, as tables or as JSON, and advice on stderr."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from adapruner.tables import Column, Table

if TYPE_CHECKING:
    from adapruner.memory import Memory
    from adapruner.result import PruneResult
    from adapruner.run.preview import Preview

GIB = 2**30

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


def print_previews(previews: list[Preview]) -> None:
    """Prints what a run would make, for every ratio."""
    console = plain_console()
    for preview in previews:
        before, after = preview.parameters_before, preview.parameters_after
        kept = f"about {after:,} of {before:,} parameters kept ({1 - after / before:.1%} removed)"
        console.print(f"{preview.folder}: {kept}", soft_wrap=True)
        console.print(f"to make: {', '.join(preview.missing) or 'nothing'}")
        console.print(
            f"on disk: model {preview.model_bytes / 1e6:,.1f} MB, moments {preview.moments_bytes / 1e6:,.1f} MB"
        )
        if preview.stages:
            console.print(table_of_memory(preview.stages, preview.device, preview.layer_wise))


def table_of_memory(stages: Mapping[str, Memory], device: str, layer_wise: bool) -> Table:
    """The memory of every stage, on the device of the model, or each of several, and in main memory beside it."""
    columns = [
        Column("stage", is_number=False),
        Column(f"GiB on {'each of ' if ',' in device else ''}{device}"),
        Column("GiB in main memory"),
        Column("largest term", is_number=False),
    ]
    rows = [
        [stage, f"{memory.device / GIB:.2f}", f"{memory.host / GIB:.2f}" if memory.host else "", memory.largest]
        for stage, memory in stages.items()
    ]
    caption = f"with {'one layer at a time' if layer_wise else 'all layers'} in memory"
    return Table("memory", "", columns, rows, [caption])


def print_json(content: Any) -> None:
    """Prints indented JSON on stdout, where nothing else is printed."""
    plain_console().print(json.dumps(content, indent=2), soft_wrap=True)


def print_advice(lines: list[str]) -> None:
    """Prints advice on stderr."""
    from adapruner.cli import with_options

    for line in lines:
        plain_console(stderr=True).print(f"advice: {with_options(line)}", style="yellow", soft_wrap=True)


def print_note(line: str) -> None:
    """Prints a line about the progress on stderr."""
    if _shows_progress():
        plain_console(stderr=True).print(line, soft_wrap=True)


def _shows_progress() -> bool:
    """Unless --quiet is set; of processes that torchrun started together, the first."""
    return logging.getLogger("adapruner").isEnabledFor(logging.INFO) and os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Shows on a terminal that libraries are being imported, which takes seconds."""
    console = plain_console(stderr=True)
    console.quiet = not _shows_progress()
    # Imports make hundreds of thousands of objects and no garbage: looking for some takes a fifth of the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        with console.status("starting"):
            yield
    finally:
        if collects:
            gc.enable()
