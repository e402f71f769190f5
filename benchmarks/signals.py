"""Signals at random moments: no command answers with a traceback, leaves something running, or loses what it had.

    OMP_NUM_THREADS=1 python benchmarks/signals.py --moments 20

`prune`, `recover`, `vocabulary`, `export` and `compare` run on a tiny model, each in a process group of its own. At a
moment drawn evenly from the time that an undisturbed command takes, the process gets SIGINT, SIGTERM, SIGHUP or
SIGPIPE, or its output is closed. Thirty seconds later, none of the group may be left. The same command is then run
again, to its end; what it made must be what an undisturbed one makes, and nothing may lie beside it. Commands that
signals reach while Python starts and imports are real ones (`python -m adapruner`); the others are forked from this
process, which has loaded the libraries.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import run as run_benchmark

import adapruner.cli
from gguf_fuzz import tiny_model
from machine import describe
from random_use import COMMANDS, call, numbers, prune_command, quickly, reference, shared

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE", "closed output")
LONGEST_END = 30
# Killed by it, or ended after it with the code of a shell.
CODES = {"SIGINT": {130}, "SIGTERM": {143}, "SIGHUP": {129}, "SIGPIPE": set[int](), "closed output": {141}}


@dataclass(frozen=True)
class Command:
    """A command: its arguments, and what it writes."""

    arguments: list[str]
    output: Path


def commands(folder: Path) -> dict[str, Command]:
    """The commands on a finished run, with outputs in a folder."""
    run, text = shared() / "a tenth", str(shared() / "text.txt")
    small = ["--evaluate", text, "--seq-len", "16", "--limit", "4", "--prompt", "8", "--new-tokens", "4"]
    small_vocabulary = ["--vocabulary-multiple", "1"]
    models = [str(shared() / "model"), str(run)]
    return {
        "prune": Command(prune_command("a tenth", folder / "run"), folder / "run"),
        "recover": Command(COMMANDS["recover"](run, folder / "recovered"), folder / "recovered"),
        "export": Command(
            ["export", str(shared() / "bytes"), "--to", "gguf", "-o", str(folder / "model.gguf")], folder / "model.gguf"
        ),
        "vocabulary": Command(
            ["vocabulary", str(shared() / "bytes"), "-o", str(folder / "cut"), "--vocabulary", text, *small_vocabulary],
            folder / "cut",
        ),
        "compare": Command(
            ["compare", *models, "--engine", "transformers", *small, "-o", str(folder / "page.html")],
            folder / "page.html",
        ),
    }


def start(arguments: list[str], said: Path, pipe: int | None = None) -> int:
    """The number of a process, in a group of its own, that runs the command line; its output goes to a file, or to a
    pipe."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if pipe is None else pipe
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    code: object = 1
    try:
        adapruner.cli.main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        print("Traceback", repr(error), file=sys.stderr)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(int(str(code or 0)))


def wait(child: int) -> int:
    """The code with which a process ends; -number if a signal ended it.

    Raises:
        AssertionError: it is running after thirty seconds.
    """
    deadline = time.monotonic() + LONGEST_END
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("still running")


def disturb(name: str, what: str, moment: float, folder: Path) -> str:
    """The end of a command that was disturbed; it is then run again to its end.

    Raises:
        AssertionError: it did not end as it must.
    """
    command, said = commands(folder)[name], folder.with_name(f"{folder.name}.txt")
    reader, writer = os.pipe() if what == "closed output" else (None, None)
    child = start(command.arguments, said, writer)
    if writer is not None:
        os.close(writer)
    time.sleep(moment)
    if reader is not None:
        os.close(reader)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, getattr(signal, what))
    code = wait(child)
    text = said.read_text() if said.exists() else ""
    assert "Traceback" not in text, text
    assert "unexpected failure" not in text, text
    assert code in CODES[what] | {0}, (code, text)
    assert not in_group(child), in_group(child)
    finish(command)
    check(name, command)
    return "finished before" if code == 0 else f"exit {code}"


def finish(command: Command) -> None:
    """Runs a command again until it is done."""
    again = call(command.arguments)
    if again.code != 0:
        # It had finished, and does not replace its output unless it is told to.
        assert "exists: choose another output" in again.last, again
        assert call([*command.arguments, "--overwrite"]).code == 0


def check(name: str, command: Command) -> None:
    left = {path.name for path in command.output.parent.iterdir()} - {command.output.name}
    assert not left, left
    if name == "prune":
        assert numbers(command.output) == reference("a tenth")
    elif name in COMMANDS:
        assert numbers(command.output) == reference("a tenth", name)
    else:
        assert command.output.exists()


def in_group(group: int) -> list[str]:
    """The processes of a group."""
    listed = subprocess.run(["ps", "-o", "args=", "-s", str(group)], capture_output=True, text=True, check=False)
    return listed.stdout.splitlines()


def seconds_of(command: Command, said: Path) -> float:
    started = time.monotonic()
    assert wait(start(command.arguments, said)) == 0, said.read_text()
    return time.monotonic() - started


def disturb_start(what: str, moment: float, folder: Path) -> str:
    """The end of a real command that gets a signal while it starts."""
    arguments = commands(folder)["export"].arguments
    process = subprocess.Popen(
        [sys.executable, "-m", "adapruner", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    time.sleep(moment)
    process.send_signal(getattr(signal, what))
    _, said = process.communicate(timeout=LONGEST_END)
    assert "Traceback" not in said, said
    number = getattr(signal, what)
    assert process.returncode in {0, -number, 128 + number}, (process.returncode, said)
    return "exit 0" if process.returncode == 0 else "ended"


def places() -> Iterator[Path]:
    while True:
        place = Path(tempfile.mkdtemp(prefix="signals-", dir=shared()))
        yield place
        shutil.rmtree(place)


def main(*, moments: int = 20, starts: int = 20, only: tuple[str, ...] = (), seed: int = 0) -> None:
    """Prints the ends of all commands; ends with code 1 if one was wrong.

    Args:
        moments: for each command.
        starts: moments while a real command starts.
        only: the commands; by default all.
    """
    print(describe(), flush=True)
    generator, ends, wrong, place = random.Random(seed), Counter[str](), 0, places()
    with quickly():
        reference("a tenth", "recover")
        # The tokenizer of the other model cannot be cut.
        for part in tiny_model():
            part.save_pretrained(shared() / "bytes")
        for name in only or commands(shared()):
            first = next(place)
            seconds = seconds_of(commands(first)[name], shared() / "first.txt")
            check(name, commands(first)[name])
            for number in range(moments):
                what, moment = SIGNALS[number % len(SIGNALS)], generator.uniform(0, seconds)
                wrong += not tried(ends, f"{name}, {what}", disturb, name, what, moment, next(place))
            print(*(f"{count:5} {end}" for end, count in sorted(ends.items()) if end.startswith(name)), sep="\n")
    for number in range(starts):
        what, moment = SIGNALS[number % 3], generator.uniform(0, 3)
        wrong += not tried(ends, f"start, {what}", disturb_start, what, moment, next(place))
    print(*(f"{count:5} {end}" for end, count in sorted(ends.items()) if end.startswith("start")), sep="\n")
    print(f"{sum(ends.values())} commands ended as they must, {wrong} did not")
    sys.exit(bool(wrong))


def tried(ends: Counter[str], title: str, disturbed: Callable[..., str], *arguments: Any) -> bool:
    """Counts the end of a command, or prints what is wrong with it."""
    try:
        ends[f"{title}: {disturbed(*arguments)}"] += 1
    except (AssertionError, OSError) as error:
        print(f"{title} {arguments}: {str(error)[:2000]}", flush=True)
        return False
    return True


if __name__ == "__main__":
    run_benchmark(main)
