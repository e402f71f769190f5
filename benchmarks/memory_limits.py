"""Runs with too little memory: the estimates against measured peaks, refusals before a run, and one line during it.

    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/memory_limits.py
    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/memory_limits.py --width 1024 --no-exhaust

A Llama of 19 million parameters (50 million with the second command) in float32 is pruned on the CPU with the default
stages and little text. Three things are tried, with limits that the system enforces (RLIMIT_DATA):

- the peak of every stage, without what the process holds once it has pruned the same model, is compared with the
  estimate: libraries keep their kernels and buffers for every shape (60 MiB for the smaller model);
- with 5 % less than a stage is said to need, the command is refused before it reads a weight, with both numbers;
- in every stage, the limit is lowered to a quarter of what the stage took: the command ends in one line and with exit
  code 2, and the same command, without a limit, resumes to the undisturbed result.

Processes are forked from this one, which has loaded the libraries. Linux only.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from cyclopts import run as run_benchmark

import adapruner.cli
from adapruner.memory import _placement
from adapruner.progress import Reporter
from machine import MIB, describe, memory
from random_use import flags, numbers, quickly
from run_memory import OPTIONS, make_model, read_stages, write_text

SMALL = OPTIONS | {"objective_windows": 16, "compensation_windows": 64, "self_windows": 8, "seq_len": 32, "ratio": 0.2}
# A stage that takes less is not stopped: libraries and buffers of the allocator take as much.
LEAST = 8 * MIB
# Mapped weights are in memory once something runs. Some blocks of real models are compared in float64, those of random
# models in float32.
FROM_ABOVE = {"loading", "comparing removals"}
_UNLIMITED = contextlib.nullcontext()


@dataclass(frozen=True)
class Ended:
    code: int
    said: str

    @property
    def last(self) -> str:
        return self.said.splitlines()[-1] if self.said else ""


@contextlib.contextmanager
def limited(more: int) -> Iterator[None]:
    """While it lasts, the data of the process may grow by so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def limited_in(name: str, more: int) -> contextlib.AbstractContextManager[object]:
    """While it lasts, the stage of that name has so many bytes beyond what is held at its begin."""
    stage = Reporter.stage

    @contextlib.contextmanager
    def with_limit(reporter: Reporter, begun: str, total: int | None = 1) -> Iterator[object]:
        with stage(reporter, begun, total) as advance, limited(more) if begun == name else contextlib.nullcontext():
            yield advance

    return mock.patch.object(Reporter, "stage", with_limit)


@contextlib.contextmanager
def prepared(arguments: list[str]) -> Iterator[None]:
    """After the libraries have their kernels and buffers in memory, as this run was made; while it lasts, no memory is
    free for what a run can do without."""
    with mock.patch.object(_placement, "_total_and_free", return_value=(1 << 50, 0)):
        with contextlib.suppress(SystemExit):
            adapruner.cli.main(arguments)
        gc.collect()
        yield


def call(arguments: list[str], said: Path, within: contextlib.AbstractContextManager[object] = _UNLIMITED) -> Ended:
    """The end of the command line in a process of its own."""
    child = os.fork()
    if not child:
        code: object = 1
        try:
            with said.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                try:
                    with within:
                        adapruner.cli.main(arguments)
                    code = 0
                except SystemExit as stop:
                    code = stop.code
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(int(str(code or 0)))
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), said.read_text())


def command(folder: Path, output: str, *more: str) -> list[str]:
    text = folder / "calibration.txt"
    options = {name.replace("_", "-"): value for name, value in SMALL.items() if name != "evaluate_windows"}
    return [
        "prune",
        str(folder / "model"),
        "-o",
        str(folder / output),
        "--calibration",
        str(text),
        *flags(options, text),
        *more,
    ]


def compare(folder: Path, estimates: dict[str, int]) -> tuple[list[str], dict[str, int]]:
    """The stages whose peak is not within a fifth of the estimate, and what each took beyond what was held before."""
    before = prepared(command(folder, "before", "--ignore-memory"))
    ended = call(command(folder, "undisturbed", "--ignore-memory"), folder / "said.txt", before)
    assert ended.code == 0, ended.said
    stages = read_stages(folder / "undisturbed/log.jsonl")
    base = stages[0].held
    assert stages[0].name == "loading"
    # The loading of a later stage is on top of what is held.
    stages = [stage for stage in stages if stage is stages[0] or stage.name != "loading"]
    peaks, took = dict[str, int](), dict[str, int]()
    for stage in stages:
        peaks[stage.name] = max(peaks.get(stage.name, 0), stage.peak - base)
        took[stage.name] = max(took.get(stage.name, 0), stage.peak - stage.held)
    rows, wrong = [f"{'stage':<24}{'estimate':>9}{'peak':>7}{'took':>7}  MiB"], []
    for name, peak in peaks.items():
        estimate = estimates.get(name, 0) / MIB
        far = f"{peak / estimate - 1:+.0%}" if estimate else ""
        rows.append(f"{name:<24}{estimate:>9.0f}{peak:>7}{took[name]:>7}  {far}")
        is_above = name in FROM_ABOVE and peak < estimate
        if estimate and not is_above and abs(peak - estimate) > max(0.2 * estimate, LEAST / MIB):
            wrong.append(f"{name}: {estimate:.0f} MiB estimated, {peak} MiB used")
    print(*rows, *wrong, sep="\n", flush=True)
    return wrong, {name: size * MIB for name, size in took.items()}


def refuse(folder: Path, name: str, estimate: int) -> str | None:
    """What is wrong with the end of a run that has a little less than a stage is said to need."""
    ended = call(command(folder, "refused"), folder / "said.txt", limited(int(0.95 * estimate)))
    is_right = ended.code == 2 and "Not enough memory: " in ended.last and not (folder / "refused").exists()
    return None if is_right else f"{name}, refused: exit code {ended.code}: {ended.said[-2000:]}"


def exhausted(folder: Path, name: str, more: int) -> str | None:
    """What is wrong with the end of a run whose stage has a quarter of what it takes."""
    arguments = command(folder, "exhausted")
    ended = call(arguments, folder / "said.txt", limited_in(name, more))
    if ended.code == 0:
        return f"{name}: did not need more than {more / MIB:.0f} MiB"
    if ended.code != 2 or "out of memory" not in ended.last or "Traceback" in ended.said:
        return f"{name}: exit code {ended.code}: {ended.said[-2000:]}"
    print(f"{name}: {ended.last[:110]}", flush=True)
    return None


def main(*, width: int = 512, exhaust: bool = True) -> None:
    """Prints estimates and peaks, and what each limit led to; ends with code 1 if one was wrong.

    Args:
        width: of the hidden states.
        exhaust: exhaust the memory of every stage.
    """
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // 64}
    print(describe(), flush=True)
    wrong = []
    with tempfile.TemporaryDirectory() as place, quickly():
        folder = Path(place)
        print(f"{make_model(folder / 'model', 4, **shape, num_key_value_heads=width // 128) / MIB:.0f} MiB of weights")
        write_text(folder / "calibration.txt", 1)
        cost = command(folder, "x")
        cost[cost.index("-o") : cost.index("-o") + 2] = []
        cost[cost.index("--calibration") : cost.index("--calibration") + 2] = []
        ended = call(["inspect", *cost[1:], "--cost", "--json"], folder / "cost.json")
        assert ended.code == 0, ended.said
        estimates = {stage["stage"]: stage["device_bytes"] for stage in json.loads(ended.said)["stages"]}
        far, took = compare(folder, estimates)
        wrong += far
        problems = [problem for name, size in estimates.items() if (problem := refuse(folder, name, size))]
        print(f"{len(estimates)} runs with 5 % less than a stage needs, {len(problems)} not refused", flush=True)
        wrong += problems
        for name, size in took.items() if exhaust else ():
            if size >= LEAST and (problem := exhausted(folder, name, size // 4)):
                wrong.append(problem)
        if exhaust:
            ended = call(command(folder, "exhausted"), folder / "said.txt")
            assert ended.code == 0, ended.said
            assert numbers(folder / "exhausted") == numbers(folder / "undisturbed")
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    run_benchmark(main)
