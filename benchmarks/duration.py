"""Predicted and true seconds of the stages of runs: of finished ones, from their logs, or of small ones that are made.

By default in seconds of one thread, because other work on the machine changes those on the clock; those of a log are
as they were.

    OMP_NUM_THREADS=1 python benchmarks/duration.py durations.jsonl --folder durations
    OMP_NUM_THREADS=1 python benchmarks/duration.py durations.jsonl --finished runs/a runs/b
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import adapruner
import machine
from adapruner.config import PruneConfig
from adapruner.graph import Making, RunFolder
from adapruner.processes import Process
from adapruner.progress import Reporter, StageCost
from adapruner.run.duration import expected_seconds
from adapruner.run.makings import makings_of
from adapruner.run.options import register_extensions

# Of the runs that are made, each in parts that end before these stages: what is left is predicted again.
PARTS = ("searching", "looking for breakage", "")
SMALL: dict[str, Any] = {
    "calibration": "boolq-passages",
    "seq_len": 64,
    "evaluate": ("boolq-passages",),
    "evaluate_windows": 16,
    "final_windows": 8,
    "trials": 9,
    "self_windows": 8,
    "level_rounds": 0,
    "tune_scales": False,
}
RUNS: list[dict[str, Any]] = [
    {"pool": 10, "objective_windows": 16, "compensation_windows": 24, "whole": ("none",), "level_rounds": 1},
    {"pool": 10, "objective_windows": 24, "compensation_windows": 32, "ratio": 0.1, "tune_scales": True},
    {"pool": 12, "objective_windows": 16, "compensation_windows": 64, "ratio": 0.3, "trials": 20},
    {"pool": 16, "objective_windows": 32, "compensation": "none", "space": "paper", "level_rounds": None},
    {"pool": 10, "objective_windows": 16, "compensation_windows": 24, "seq_len": 128, "ratio": 0.4},
]
Stages = dict[str, tuple[float, float]]


class Timed(adapruner.Callback):
    """Seconds of every stage, by a clock; ends the run before one of them."""

    def __init__(self, clock: Callable[[], float], last: str) -> None:
        self.clock, self.last, self.begun = clock, last, list[float]()
        self.seconds = defaultdict[str, float](float)

    def on_stage_begin(self, stage: str) -> None:
        if stage == self.last:
            raise KeyboardInterrupt
        self.begun.append(self.clock())

    def on_stage_end(self, stage: str, cost: StageCost) -> None:
        self.seconds[stage] += self.clock() - self.begun.pop()


def made(folder: Path, options: dict[str, Any], clock: Callable[[], float], last: str) -> Stages:
    """By stage of a part of a run, the predicted and the true seconds; "in all" from the prediction to its end."""
    predictions, timed = list[tuple[dict[str, float], float]](), Timed(clock, last)

    def predict(makings: Sequence[Making]) -> dict[str, float]:
        seconds = expected_seconds(makings)
        predictions.append((seconds, clock()))
        return seconds

    with patch("adapruner.run.api.expected_seconds", predict), suppress(KeyboardInterrupt):
        adapruner.prune("smollm2", output=folder, callbacks=[timed], **options)
    ((predicted, started),) = predictions
    stages = {stage: (predicted.get(stage, 0.0), seconds) for stage, seconds in timed.seconds.items()}
    return stages | {"in all": (sum(seconds for seconds, _ in stages.values()), clock() - started)}


def finished(folder: Path, known: dict[str, Any]) -> tuple[dict[str, Any], Stages]:
    """The options of a finished run, and by each predicted stage in its log, the predicted and the true seconds.

    Args:
        known: the models, if they are loaded.
    """
    config = PruneConfig.load(folder / "config.yaml")
    register_extensions(config)
    making = makings_of(config, RunFolder.temporary(), Process(), Reporter(), known=known)[0]
    making.prepare(making.missing())
    known |= {name: making.value(name) for name in ("dense", "dense_fast")}
    true, predicted = defaultdict[str, float](float), expected_seconds([making])
    for entry in map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()):
        true[entry["stage"]] += entry.get("seconds", 0.0)
    stages = {stage: (predicted[stage], seconds) for stage, seconds in true.items() if stage in predicted}
    in_all = (sum(seconds for seconds, _ in stages.values()), sum(seconds for _, seconds in stages.values()))
    return config.model_dump(mode="json"), stages | {"in all": in_all}


@contextmanager
def measured_by(clock: Callable[[], float]) -> Iterator[None]:
    """While it lasts, a run times itself by a clock."""
    with patch("adapruner.costs._pace.now", lambda device: clock()):
        yield


def report(about: str, options: dict[str, Any], stages: Stages, output: Path) -> None:
    """Writes and prints a comparison."""
    rounded = {stage: [round(seconds, 1) for seconds in both] for stage, both in stages.items()}
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"run": about, "options": options, "stages": rounded}) + "\n")
    print(about)
    for stage, (predicted, true) in rounded.items():
        print(f"{stage:22} {predicted:8.1f} {true:8.1f} {predicted / true if true else 0:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="JSON lines, one for each run")
    parser.add_argument("--finished", type=Path, nargs="+", default=[], help="run folders")
    parser.add_argument("--folder", type=Path, help="for run folders that are made")
    parser.add_argument("--only", nargs="+", help="parts of these")
    parser.add_argument("--wall", action="store_true", help="seconds on the clock, all threads")
    arguments = parser.parse_args()
    if not arguments.wall:
        torch.set_num_threads(1)
    clock = time.monotonic if arguments.wall else time.process_time
    print(machine.describe())
    with measured_by(clock):
        known = dict[str, Any]()
        for folder in arguments.finished:
            report(str(folder), *finished(folder, known), arguments.output)
        for number, options in enumerate(RUNS if arguments.folder else []):
            for last in PARTS:
                about = f"run {number}, {f'before {last}' if last else 'the rest'}"
                if not arguments.only or about in arguments.only:
                    stages = made(arguments.folder / str(number), SMALL | options, clock, last)
                    report(about, SMALL | options, stages, arguments.output)


if __name__ == "__main__":
    main()
