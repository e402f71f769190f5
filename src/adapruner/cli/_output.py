"""Results on stdout, as tables or as JSON, and advice on stderr."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from json import dumps
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python
from rich.console import RenderableType

from adapruner.terminal import PlainConsole

if TYPE_CHECKING:
    from adapruner.memory import Memory

GIB = 2**30

# What a shell reports of a process that SIGPIPE ended.
CLOSED_OUTPUT = 141


class _Console(PlainConsole):
    def on_broken_pipe(self) -> None:
        """Ends as other tools do if the reader of stdout has ended; rich drops the output, but exits with code 1.
        Output on stderr that nobody reads is dropped, and the command continues."""
        if self.stderr:
            return
        try:
            super().on_broken_pipe()
        finally:
            sys.exit(CLOSED_OUTPUT)


def plain_console(stderr: bool = False) -> PlainConsole:
    """A console on stdout or stderr."""
    return _Console(stderr=stderr)


def print_output(content: Any, json: bool, shown: Iterable[RenderableType]) -> None:
    """Prints the result of a verb on stdout.

    Args:
        content: the result: models of pydantic, dataclasses, and lists and dicts of them.
        json: print the content as indented JSON, and nothing else.
        shown: printed otherwise: tables, and lines that are not wrapped.
    """
    console = plain_console()
    for line in [dumps(_finite(to_jsonable_python(content)), indent=2)] if json else shown:
        console.print(line, soft_wrap=isinstance(line, str))


def _finite(content: Any) -> Any:
    """The content without infinities and NaN, which JSON does not have: such a field is null, and `NAME_missing` beside
    it says why."""
    if isinstance(content, list):
        return [*map(_finite, content)]
    if not isinstance(content, dict):
        return content
    finite = {}
    for name, value in content.items():
        finite[name] = _finite(value)
        if isinstance(value, float) and not math.isfinite(value):
            finite[name] = None
            finite[f"{name}_missing"] = "not a number" if math.isnan(value) else "too large for a number"
    return finite


def where(device: str, layer_wise: bool) -> str:
    """Which layers are in memory at a time, and what a run leaves out for that."""
    if layer_wise:
        return "one layer at a time in memory, which leaves out the text that the original writes for the verdict"
    if count := device.count(","):
        return f"all layers in memory, spread over {count + 1} devices, which leaves out the training of scales"
    return "all layers in memory"


def memory_line(memory: Memory, device: str) -> str:
    """The memory of a run on the device of the model, on each if there are several, and in main memory."""
    place = f"each of {device}" if "," in device else device
    host = f", and {memory.host / GIB:.3g} GiB of main memory" if memory.host else ""
    return f"memory: {memory.arithmetic} on {place}{host}"


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
    """True unless --quiet is set; of processes that torchrun started together, for the first alone."""
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
