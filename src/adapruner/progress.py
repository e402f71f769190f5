"""What the user sees while it runs: bars on a terminal and in a notebook, one line per stage in a log; and the log file
of the run."""

from __future__ import annotations

import contextlib
import ctypes
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_quiet = False
# Advances a stage by some steps; the text is shown beside the bar.
Advance = Callable[..., None]


def set_quiet(quiet: bool) -> None:
    """Whether the reporters of this process that are made from now on print nothing."""
    global _quiet
    _quiet = quiet


class Reporter:
    """Reports stages on stderr and, where a file is given, as JSON lines in it.

    Attributes:
        current: the stage that was last begun.
    """

    def __init__(self, log: Path | None = None) -> None:
        self.console = Console(stderr=True, markup=False, emoji=False, highlight=False, quiet=_quiet)
        self.shows_bars = self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets") is not None)
        self.log = log
        self.current = "preparing"

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Wraps one stage of `total` steps; yields the function that advances it."""
        started, self.current = time.monotonic(), name
        _forget_peak_memory()
        self._record(event="started", stage=name, memory_mib=_memory_mib("VmRSS:"))
        if self.shows_bars:
            yield from self._with_bar(name, total)
        else:
            yield lambda steps=1, text="": None
        seconds = time.monotonic() - started
        if not self.shows_bars:
            self.note(f"{name}: done in {seconds:.1f} s")
        self._record(event="finished", stage=name, seconds=round(seconds, 2), peak_memory_mib=_peak_memory_mib())

    def note(self, line: str) -> None:
        """Says something once."""
        self.console.print(line, soft_wrap=True)

    def finished_stages(self) -> dict[str, dict[str, float]]:
        """Seconds and peak memory of every finished stage, from the log: those before an interruption too, and where a
        stage was done in parts, of all of them."""
        stages: dict[str, dict[str, float]] = {}
        if self.log and self.log.is_file():
            for line in self.log.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the line that a kill cut off
                    entry = json.loads(line)
                    if entry["event"] == "finished":
                        before = stages.get(entry["stage"], {"seconds": 0.0, "peak_memory_mib": 0})
                        stages[entry["stage"]] = {
                            "seconds": round(before["seconds"] + entry["seconds"], 2),
                            "peak_memory_mib": max(before["peak_memory_mib"], entry["peak_memory_mib"]),
                        }
        return stages

    def _with_bar(self, name: str, total: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.console) as bars:
            task = bars.add_task(name, total=total, text="")
            yield lambda steps=1, text="": bars.update(task, advance=steps, text=text)

    def _record(self, **entry: Any) -> None:
        if self.log:
            with self.log.open("a") as file:
                file.write(json.dumps({"time": time.time(), **entry}) + "\n")


def _forget_peak_memory() -> None:
    """Gives freed memory back, and lets the peak begin at what the process holds now; where the system cannot, it is
    that since the start."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_mib() -> int:
    """The most memory that the process has held since the last `_forget_peak_memory`, in MiB."""
    peak = _memory_mib("VmHWM:")
    if peak is not None:
        return peak
    peak_so_far = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_so_far // (1024 * 1024 if sys.platform == "darwin" else 1024)


def _memory_mib(field: str) -> int | None:
    """A field of Linux's /proc/self/status; None elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith(field)), None)
