"""Random use: sequences of commands on one run folder, each checked against a model of what it must leave.

    OMP_NUM_THREADS=1 python benchmarks/random_use.py --sequences 500

A sequence prunes a tiny model, changes options, is killed or interrupted, plans another ratio, fine-tunes,
reports, and damages files, in any order. Every command ends with a documented exit code and without a traceback; one
that succeeds leaves the numbers and weights of an undisturbed run, one that is refused leaves the folder as it was.
Commands run in this process; a kill is an exception that no code catches, raised where a file is put in its place.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import io
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from cyclopts import run as run_benchmark
from hypothesis import HealthCheck, Phase, seed as hypothesis_seed, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import adapruner.cli
import adapruner.files
from adapruner.evaluation import _writing
from adapruner.progress import Reporter
from machine import describe
from soak import write_model, write_text

_SMALL: dict[str, object] = {
    "pool": 4,
    "samples": 2,
    "objective-windows": 4,
    "final-windows": 2,
    "seq-len": 16,
    "trials": 5,
    "round-to": 1,
    "compensation-windows": 8,
    "self-windows": 2,
    "no-tune-scales": True,
}
_TRAINING: dict[str, object] = {"steps": 2, "batch-size": 2, "micro-batch-size": 2, "seq-len": 16, "records": 12}
_RECOVERY: dict[str, object] = {"recover": "TEXT", **{f"recovery.{name}": value for name, value in _TRAINING.items()}}
# The options of a run, by name.
VARIANTS: dict[str, dict[str, object]] = {
    "a tenth": {"ratio": 0.1},
    "a fifth": {"ratio": 0.2},
    "another seed": {"ratio": 0.1, "seed": 1},
    "both": {"ratio": [0.1, 0.2]},
    "recovered": {"ratio": 0.1, **_RECOVERY},
    "not compensated": {"ratio": 0.1, "compensation": "none"},
}
# Sequences of one seed: hypothesis begins every series with the shortest sequence.
_BATCH = 50
DAMAGED, OTHER_OPTIONS = "is damaged", "a run of another configuration"


class Killed(SystemExit):
    """Stands for SIGKILL; the command line lets nothing else pass."""


@dataclass(frozen=True)
class Outcome:
    """The end of a command; the code of a killed one is None."""

    code: int | None
    said: str

    @property
    def last(self) -> str:
        return self.said.splitlines()[-1] if self.said else ""


def flags(options: dict[str, object], text: Path) -> list[str]:
    arguments = []
    for name, value in options.items():
        for entry in value if isinstance(value, list) else [value]:
            arguments += [f"--{name}", *([] if entry is True else [str(text) if entry == "TEXT" else str(entry)])]
    return arguments


def call(arguments: list[str]) -> Outcome:
    """Runs the command line in this process.

    Raises:
        AssertionError: it ended in a way that is not documented.
    """
    said, code = io.StringIO(), 0
    started = time.monotonic()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            adapruner.cli.main(arguments)
        except Killed:
            return Outcome(None, said.getvalue())
        except SystemExit as stop:
            code = int(stop.code or 0)
    outcome = Outcome(code, said.getvalue())
    assert code in (0, 2, 130), outcome
    assert code == 0 or outcome.last.startswith("adapruner: "), outcome
    assert "Traceback" not in outcome.said, outcome
    assert "Warning" not in outcome.said, outcome
    assert time.monotonic() - started < 120, arguments
    return outcome


@contextlib.contextmanager
def ended_at(place: Any, name: str, count: int, error: BaseException) -> Iterator[None]:
    """While it lasts, a function of a module or class raises an error at a call."""
    original, left = getattr(place, name), count

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise error
        return original(*arguments, **named)

    setattr(place, name, counted)
    try:
        yield
    finally:
        setattr(place, name, original)


@cache
def shared() -> Path:
    """A folder with the model and the text of this process."""
    folder = Path(tempfile.mkdtemp(prefix="random-use-"))
    atexit.register(shutil.rmtree, folder)
    write_model(folder / "model")
    write_text(folder / "text.txt")
    return folder


def prune_command(variant: str, output: Path, *more: str) -> list[str]:
    text = shared() / "text.txt"
    options = {"calibration": "TEXT", **_SMALL, **VARIANTS[variant]}
    return ["prune", str(shared() / "model"), "-o", str(output), *flags(options, text), *more]


def plan_command(run: Path, output: Path) -> list[str]:
    return ["plan", str(run), "--ratio", "0.15", "-o", str(output)]


def recover_command(run: Path, output: Path) -> list[str]:
    text = str(shared() / "text.txt")
    return ["recover", str(run / "model"), "--data", text, "-o", str(output), *flags(_TRAINING, Path(text))]


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "plan": plan_command,
    "recover": recover_command,
}


def numbers(folder: Path) -> dict[str, Any]:
    """What a finished folder says, except times and places, and the weights in it."""
    content: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name in _RECORDS:
            record = json.loads(path.read_text())
            content[name] = {key: value for key, value in record.items() if key not in _RECORDS[path.name]}
        elif path.suffix == ".safetensors" and path.name.startswith("model"):
            content[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert content, folder
    return content


# What differs between equal runs.
_RECORDS = {"result.json": ("stages", "recovery"), "recovery.json": ("seconds", "config")}


@cache
def reference(variant: str, command: str = "") -> dict[str, Any]:
    """The numbers of an undisturbed run, or of a command on it."""
    run = shared() / variant
    if not command:
        assert call(prune_command(variant, run)).code == 0
        return numbers(run)
    reference(variant)
    output = shared() / f"{variant}-{command}"
    assert call(COMMANDS[command](run, output)).code == 0
    return numbers(output)


def files(folder: Path) -> dict[str, bytes]:
    """The content of all files that a refused command leaves as they are."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("log.jsonl", ".lock"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


ANY_VARIANT = st.runner().flatmap(lambda machine: st.sampled_from(machine.variants))


class RandomUse(RuleBasedStateMachine):
    """One user, one run folder."""

    done: ClassVar[Counter[str]] = Counter()
    variants: ClassVar[Sequence[str]] = sorted(VARIANTS)

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="random-use-"))
        self.run = self.place / "run"
        # The variants whose artifacts may be in the folder; the one that is finished; files that were damaged.
        self.begun: set[str] = set()
        self.finished: str | None = None
        self.damaged: set[str] = set()
        self.recovered_from: str | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.place)
        RandomUse.done["sequences"] += 1

    def count(self, what: str) -> None:
        RandomUse.done[what] += 1

    @initialize(variant=ANY_VARIANT)
    def first(self, variant: str) -> None:
        self.prune(variant, False)

    @rule(variant=ANY_VARIANT, overwrite=st.booleans())
    def prune(self, variant: str, overwrite: bool) -> None:
        before = files(self.run)
        outcome = call(prune_command(variant, self.run, *["--overwrite"] * overwrite))
        self.check_pruned(variant, overwrite, before, outcome)

    @rule(
        variant=ANY_VARIANT,
        overwrite=st.booleans(),
        moment=st.integers(1, 60),
        kill=st.booleans(),
        as_before=st.booleans(),
    )
    def end_early(self, variant: str, overwrite: bool, moment: int, kill: bool, as_before: bool) -> None:
        """Prunes, and is killed where a file is written, or interrupted where a stage begins."""
        if as_before and self.begun:
            variant = sorted(self.begun)[0]
        before = files(self.run)
        place: tuple[Any, str, BaseException] = (os, "replace", Killed())
        if not kill:
            place, moment = (Reporter, "stage", KeyboardInterrupt()), 1 + moment // 5
        with ended_at(*place[:2], moment, place[2]):
            outcome = call(prune_command(variant, self.run, *["--overwrite"] * overwrite))
        if outcome.code in (None, 130):
            self.count("killed" if kill else "interrupted")
            self.begun.add(variant)
            self.finished = None if self.finished != variant or self.damaged else self.finished
        else:
            self.check_pruned(variant, overwrite, before, outcome)

    def check_pruned(self, variant: str, overwrite: bool, before: dict[str, bytes], outcome: Outcome) -> None:
        if outcome.code == 0:
            self.count("pruned")
            assert_equal(numbers(self.run), reference(variant))
            assert not (self.run / "unfinished").exists()
            self.begun, self.finished, self.damaged = {variant}, variant, set()
            return
        self.count("refused")
        if OTHER_OPTIONS in outcome.last:
            assert not overwrite
            assert files(self.run) == before, files(self.run).keys() ^ before.keys()
            # A changed record is one of other options.
            assert self.begun - {variant} or any("keys/" in name for name in self.damaged), outcome
        elif DAMAGED in outcome.last:
            assert any("study.jsonl" in name for name in self.damaged), outcome
            for study in self.run.rglob("study.jsonl"):
                study.unlink()
        else:
            assert "config.yaml" in self.damaged, outcome
            shutil.rmtree(self.run)
            self.begun, self.finished, self.damaged = set(), None, set()

    @precondition(lambda self: self.run.is_dir())
    @rule(number=st.integers(0, 10**6), how=st.sampled_from(["cut", "empty", "change", "remove"]))
    def damage(self, number: int, how: str) -> None:
        """Damages a file of the run."""
        names = sorted(files(self.run))
        if not names:
            return
        path = self.run / names[number % len(names)]
        # Of work in progress, changed values are not noticed.
        content, is_work = path.read_bytes(), path.name == "study.jsonl" or "unfinished" in path.parts
        if how == "remove":
            path.unlink()
        elif how == "change" and content and not is_work:
            place = random.Random(number).randrange(len(content))
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        else:
            path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
        self.count("damaged")
        self.damaged.add(names[number % len(names)])

    @precondition(lambda self: self.run.is_dir())
    @rule()
    def report(self) -> None:
        outcome = call(["report", str(self.run)])
        self.count("reported" if outcome.code == 0 else "not reported")
        assert outcome.code == 0 or self.damaged or not (self.run / "config.yaml").exists(), outcome

    @precondition(lambda self: self.run.is_dir())
    @rule()
    def plan(self) -> None:
        """Plans another ratio from the run."""
        output = self.place / "plan"
        before = files(self.run)
        outcome = call(plan_command(self.run, output))
        self.count("plan" if outcome.code == 0 else "no plan")
        assert files(self.run) == before
        if self.finished is not None and not self.damaged:
            assert outcome.code == 0, outcome
            assert_equal(numbers(output), reference(self.finished, "plan"))
        shutil.rmtree(output, ignore_errors=True)

    @precondition(lambda self: self.finished not in (None, "both"))
    @rule(moment=st.none() | st.integers(1, 12))
    def recover(self, moment: int | None) -> None:
        """Fine-tunes the model of the run, or is killed on the way."""
        output = self.place / "tuned"
        with ended_at(os, "replace", moment, Killed()) if moment else contextlib.nullcontext():
            outcome = call(recover_command(self.run, output))
        if outcome.code is None:
            self.count("recovery killed")
            self.recovered_from = self.recovered_from or self.finished
        elif outcome.code == 0:
            self.count("recovered")
            if not self.damaged:
                assert_equal(numbers(output), reference(self.finished or "", "recover"))
            self.recovered_from = self.finished
        else:
            self.count("no recovery")
            assert self.damaged or self.recovered_from not in (None, self.finished), outcome
            shutil.rmtree(output, ignore_errors=True)
            shutil.rmtree(self.place / "tuned.training", ignore_errors=True)
            self.recovered_from = None


def assert_equal(numbers: dict[str, Any], expected: dict[str, Any]) -> None:
    # What a run with other options fine-tuned stays, and nothing reads it.
    left = {name for name in numbers.keys() - expected.keys() if name.startswith("recovered/")}
    # The model before its scales are tuned is made only if something needs it.
    unneeded = {name for name in expected.keys() - numbers.keys() if Path(name).parent.name == "compensated"}
    assert numbers.keys() - left == expected.keys() - unneeded, numbers.keys() ^ expected.keys()
    for name in expected.keys() - unneeded:
        assert numbers[name] == expected[name], name


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """While it lasts, nothing waits for the disk, texts are short, and no garbage is looked for in what is imported."""
    gc.freeze()
    with contextlib.ExitStack() as changed:
        for place, name, value in ((adapruner.files, "_flush", lambda path: None), (_writing, "_CONTINUED", 8)):
            changed.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        yield


def use(sequences: int, seed: int, steps: int = 8, variants: Sequence[str] = sorted(VARIANTS)) -> Counter[str]:
    """Runs sequences of at most so many commands, and counts what happened.

    Raises:
        AssertionError: a command left something else than it must.
    """
    RandomUse.variants = variants
    with quickly():
        options = settings(
            max_examples=sequences,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(hypothesis_seed(seed)(RandomUse), settings=options)
    return RandomUse.done


def main(*, sequences: int = 500, seed: int = 0, steps: int = 8, minutes: float = math.inf) -> None:
    """Prints what happened after every batch; ends with the steps of the first sequence that failed.

    Args:
        minutes: after which no further batch begins.
    """
    print(describe(), flush=True)
    started = time.monotonic()
    for first in range(0, sequences, _BATCH):
        if time.monotonic() - started < 60 * minutes:
            try:
                use(min(_BATCH, sequences - first), seed + first, steps)
            finally:
                print(f"{time.monotonic() - started:.0f} s: {dict(RandomUse.done)}", flush=True)


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
