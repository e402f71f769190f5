"""The stages of a finished run in forward passes of the dense model over the tokens that they read.

    OMP_NUM_THREADS=1 python benchmarks/floors.py RUN

The floor of a stage counts what it cannot do without: a pass for each token that is read or written, two with a
backward pass that reaches inputs alone, three with the gradients of weights. A pass is timed when this is run, so other
work on the machine should be what it was during the run.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

import machine
from adapruner.config import PruneConfig
from adapruner.costs import time_work
from adapruner.graph import RunFolder
from adapruner.progress import Reporter
from adapruner.run.duration import missing_work
from adapruner.run.makings import makings_of
from adapruner.run.options import register_extensions

# The passes through the layers and through the head that a unit of each kind of work cannot do without.
PASSES = {
    "layers": (1, 0),
    "predictions": (0, 1),
    "evaluated": (1, 1),
    "written": (1, 1),
    "measured": (3, 3),
    "learnt": (2, 2),
    "sums": (0, 0),
    "solved": (0, 0),
    "seconds": (0, 0),
}


def main(run: Path) -> None:
    """Prints a row for each stage: seconds of the floor, seconds, and their ratio."""
    config = PruneConfig.load(run / "config.yaml")
    register_extensions(config)
    making = makings_of(config, RunFolder.temporary(), Reporter())[0]
    making.prepare(making.missing())
    work = missing_work([making])
    values = ("dense", "dense_fast", "structure", "seq_len", "terms")
    of_pass = time_work({"layers", "predictions"}, *map(making.value, values))
    floors, taken = defaultdict[str, float](float), defaultdict[str, float](float)
    for stage, kind, count in work:
        in_layers, in_head = PASSES[kind]
        floors[stage] += count * (in_layers * of_pass["layers"] + in_head * of_pass["predictions"])
    for entry in map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines()):
        taken[entry["stage"]] += entry.get("seconds", 0.0)
    print(machine.describe())
    print(f"a pass: {1 / sum(of_pass.values()):.0f} tokens per second")
    for stage, seconds in taken.items():
        if floors[stage]:
            print(f"{stage:22} {floors[stage]:7.1f} {seconds:7.1f} {seconds / floors[stage]:6.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
