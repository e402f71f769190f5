"""Progress and text on a terminal: bars, elsewhere a line per stage and minute; and the log file of a run."""

import contextlib
import ctypes
import json
import logging
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

# Line ends and tabs; and the joiners of Indic scripts, Persian and emoji.
_HARMLESS = "\n\t\u200c\u200d"


def printable(text: str) -> str:
    """A text with its control characters escaped: they could move the cursor of a terminal, or colour or turn round
    what follows."""
    if text.isprintable():
        return text
    harmless = {sign for sign in text if sign in _HARMLESS or unicodedata.category(sign) == "Zs"}
    return "".join(sign if sign.isprintable() or sign in harmless else ascii(sign)[1:-1] for sign in text)


class PlainConsole(Console):
    """Names of models, files and datasets may look like markup or emoji, or have control characters, or characters that
    the encoding of the terminal lacks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def encoding(self) -> str:
        """That of stdout or stderr too; rich reads that of a given file alone, and draws tables accordingly."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    def render_str(self, text: str, **options: Any) -> Text:
        encoded = printable(text).encode(self.encoding, "backslashreplace")
        return super().render_str(encoded.decode(self.encoding), **options)


# At INFO, which the package sets, stages are shown; at DEBUG, what is recorded of them is logged too.
_logger = logging.getLogger("adapruner")
MIB = 2**20
# Width of the longest name of a stage, so that bars are aligned; and of numbers up to 9999.
_STAGE_WIDTH, _COUNT_WIDTH = 24, 9
# Seconds over which the remaining time is estimated: a step may take half a minute.
_PERIOD = 300.0
# Seconds after which a stage without a bar prints a line, again and again.
_SILENCE = 60.0
# Advances a stage by some steps; the text is shown next to the bar.
Advance = Callable[..., None]


class StageCost(BaseModel, extra="forbid", frozen=True):
    """Seconds of a stage, and its peak memory: that of the process, and that of PyTorch on an accelerator."""

    seconds: float
    peak_memory_mib: int
    peak_on_accelerator_mib: int = 0


class Reporter:
    """Reports stages on stderr and, once there is a log file, as JSON lines in it.

    Args:
        quiet: print nothing, as if the level of the logger `adapruner` were above INFO.

    Attributes:
        log: the file.
        current: the stage that is running, or that an error ended.
        key: of the artifact that is being made, if any.
        subject: what the stages of this artifact are about, for the printed lines.
    """

    def __init__(self, quiet: bool = False) -> None:
        # Bound to stderr as it is now, so that a redirection for another library does not catch our bars.
        quiet = quiet or not _logger.isEnabledFor(logging.INFO)
        self.console = PlainConsole(file=sys.stderr, quiet=quiet)
        self.shows_bars = self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets") is not None)
        self.log: Path | None = None
        self.current, self.key, self.subject = "preparing", "", ""

    @contextlib.contextmanager
    def making(self, key: str, subject: str = "") -> Iterator[None]:
        """Records in the log that stages belong to an artifact, while this lasts.

        Args:
            key: of the artifact.
            subject: printed with the stages, if several artifacts have the same ones.
        """
        outer, self.key, self.subject = (self.key, self.subject), key, subject
        try:
            yield
        finally:
            self.key, self.subject = outer

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = 1) -> Iterator[Advance]:
        """Wraps one stage of `total` steps, all done at its end; yields the function that advances it. Without a total,
        nobody knows yet how many there are."""
        started, outer, self.current = time.monotonic(), self.current, name
        reset_peak_memory()
        if module := _accelerator():
            for index in range(module.device_count()):
                module.reset_peak_memory_stats(index)
        self._record(event="started", stage=name, memory_mib=held_memory() // MIB)
        if self.shows_bars:
            yield from self._with_bar(name, total)
        else:
            yield from self._with_lines(name, total)
        seconds, self.current = time.monotonic() - started, outer
        if not self.shows_bars:
            self.note(f"{self._title(name)}: done in {seconds:.1f} s")
        module = _accelerator()
        # Of several devices, that of the one with the highest peak.
        on_devices = [int(module.max_memory_allocated(n)) for n in range(module.device_count())] if module else []
        peaks = {"peak_memory_mib": peak_memory() // MIB, "peak_on_accelerator_mib": max(on_devices, default=0) // MIB}
        self._record(event="finished", stage=name, **StageCost(seconds=round(seconds, 2), **peaks).model_dump())

    def note(self, lines: str) -> None:
        """Prints lines, if there are any."""
        if lines:
            self.console.print(lines, soft_wrap=True)

    def finished_stages(self, keys: Collection[str]) -> dict[str, StageCost]:
        """The cost of every finished stage, from the log: also of stages before an interruption, and summed over the
        parts of a stage.

        Args:
            keys: of the artifacts that count; stages for other artifacts are left out.
        """
        stages: dict[str, StageCost] = {}
        if self.log and self.log.is_file():
            for line in self.log.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the line that a kill cut off
                    entry = json.loads(line)
                    if entry["event"] == "finished" and entry.get("key", "") in ("", *keys):
                        before = stages.get(entry["stage"], StageCost(seconds=0, peak_memory_mib=0))
                        stages[entry["stage"]] = StageCost(
                            seconds=round(before.seconds + entry["seconds"], 2),
                            peak_memory_mib=max(before.peak_memory_mib, entry["peak_memory_mib"]),
                            peak_on_accelerator_mib=max(
                                before.peak_on_accelerator_mib, entry.get("peak_on_accelerator_mib", 0)
                            ),
                        )
        return stages

    def _with_bar(self, name: str, total: int | None) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}", table_column=Column(min_width=_STAGE_WIDTH)),
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=Column(min_width=_COUNT_WIDTH)),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.console, speed_estimate_period=_PERIOD) as bars:
            task = bars.add_task(name, total=total, text="")
            yield lambda steps=1, text="": bars.update(task, advance=steps, text=text)
            bars.update(task, completed=total)

    def _with_lines(self, name: str, total: int | None) -> Iterator[Advance]:
        """Prints how far the stage is about once a minute, from a thread: a single step may take longer than that. The
        remaining time follows from the pace since the first step, which a resumed stage makes at once."""
        started, done, shown, ended = time.monotonic(), 0.0, "", threading.Event()
        first: tuple[float, float] | None = None

        def advance(steps: float = 1, text: str = "") -> None:
            nonlocal done, shown, first
            done, shown = done + steps, f", {text}" if text else ""
            first = first or (time.monotonic(), done)

        def print_lines() -> None:
            while not ended.wait(_SILENCE):
                now, steps, left = time.monotonic(), "", ""
                if total and total > 1:
                    steps = f"{int(done)} of {total} after "
                    if first and first[1] < done < total:
                        seconds = (total - done) * (now - first[0]) / (done - first[1])
                        left = f", about {seconds / 60:.0f} min left"
                self.note(f"{self._title(name)}: {steps}{(now - started) / 60:.0f} min{left}{shown}")

        thread = threading.Thread(target=print_lines, daemon=True)
        thread.start()
        try:
            yield advance
        finally:
            ended.set()
            thread.join()

    def _title(self, name: str) -> str:
        return f"{name} ({self.subject})" if self.subject else name

    def _record(self, **entry: object) -> None:
        _logger.debug("%s", json.dumps(entry))
        if self.log:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), "key": self.key, **entry}) + "\n")


def give_back_memory() -> None:
    """Returns freed memory to the system, if the C library keeps it (glibc)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory() -> bool:
    """Returns freed memory, and resets the peak of this process to the memory that it holds now; False if the system
    cannot do that (all but Linux)."""
    give_back_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _accelerator() -> ModuleType | None:
    """The module of PyTorch for the accelerator in use. PyTorch is not imported for it, so that `--help` is fast."""
    if "torch" not in sys.modules:
        return None
    from adapruner.base.processes import accelerator_in_use

    in_use = accelerator_in_use()
    return in_use and in_use[1]


def held_memory() -> int:
    """Bytes of memory that this process holds."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The peak memory of this process in bytes: on Linux since `reset_peak_memory`, on Windows since its start;
    elsewhere the memory that it holds now."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))
