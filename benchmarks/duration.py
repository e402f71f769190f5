"""Predicted and true seconds of each stage of real runs.

Runs are of SmolLM2 with little text, one after the other; each is resumed once with another option, so that only a part
of it is missing. By default in seconds of one thread, because other work on the machine changes those on the clock.

    OMP_NUM_THREADS=1 python benchmarks/duration.py --output durations.jsonl
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import adapruner
import machine
from adapruner.costs import _pace
from adapruner.progress import StageCost
from adapruner.run import api

# The options of each run; a second set is for the same folder afterwards, with `overwrite`.
SMALL: dict[str, Any] = {"effort": "quick", "calibration": "boolq-passages", "evaluate_windows": 32}
RUNS: list[list[dict[str, Any]]] = [
    [{"pool": 16, "compensation_windows": 32, "whole": ("none",)}, {"trials": 24}],
    [{"pool": 16, "compensation_windows": 64, "self_windows": 0, "objective_windows": 32}, {"tune_scales": True}],
    [{"pool": 10, "compensation_windows": 48, "whole": ("none",), "ratio": 0.3}, {"level_rounds": 1}],
    [{"pool": 24, "compensation": "none", "seq_len": 64, "ratio": 0.1}, {"space": "paper", "level_rounds": None}],
    [{"pool": 12, "compensation_windows": 32, "self_windows": 32, "trials": 4, "seq_len": 256}, {"seed": 1}],
]


class Timed(adapruner.Callback):
    """Seconds of every stage, by a clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds, self.begun = clock, Counter[str](), list[float]()

    def on_stage_begin(self, stage: str) -> None:
        self.begun.append(self.clock())

    def on_stage_end(self, stage: str, cost: StageCost) -> None:
        self.seconds[stage] += self.clock() - self.begun.pop()  # type: ignore[assignment]


def compare(folder: Path, options: dict[str, Any], clock: Callable[[], float]) -> dict[str, Any]:
    """The options, and by stage the predicted and the true seconds; "in all" from the prediction to the end."""
    predicted, started, ended, timed, predict = dict[str, float](), [0.0], 0.0, Timed(clock), api.expected_seconds

    def noting(makings: Sequence[Any]) -> dict[str, float]:
        before = clock()
        predicted.update(predict(makings))
        started[0] = clock()
        predicted["predicting"] = started[0] - before
        return {name: value for name, value in predicted.items() if name != "predicting"}

    _pace.now, api.expected_seconds = lambda device: clock(), noting  # type: ignore[assignment]
    try:
        adapruner.prune("smollm2", output=folder, overwrite=True, callbacks=[timed], **options)
        ended = clock()
    finally:
        _pace.now, api.expected_seconds = torch_now, predict
    predicting, stages = predicted.pop("predicting"), {}
    for stage in dict.fromkeys([*predicted, *timed.seconds]):
        stages[stage] = [round(predicted.get(stage, 0.0), 2), round(timed.seconds[stage], 2)]
    stages["in all"] = [round(sum(predicted.values()), 2), round(ended - started[0], 2)]
    return {"options": options, "predicting": round(predicting, 2), "stages": stages}


torch_now = _pace.now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one for each run")
    parser.add_argument("--wall", action="store_true", help="seconds on the clock")
    parser.add_argument("--only", type=int, action="append", help="number of a pair of runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if not arguments.wall else torch.get_num_threads())
    print(machine.describe())
    for number, pair in enumerate(RUNS):
        if arguments.only and number not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = dict(SMALL)
            for changes in pair:
                options |= changes
                row = compare(Path(folder), options, time.monotonic if arguments.wall else time.process_time)
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                for stage, (predicted, true) in row["stages"].items():
                    print(f"{stage:22} {predicted:8.1f} {true:8.1f} {predicted / true if true else 0:6.2f}", flush=True)


if __name__ == "__main__":
    main()
