"""Trials per second of one process and of two, each on a core of its own, with SQLite and with PostgreSQL.

    python benchmarks/workers.py --measured runs/measured

`--measured` is a run folder that was measured before. Every trial looks at the same windows, none is stopped early. Of
two processes, the time during which both were at it counts.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Literal

from cyclopts import run
from optuna.trial import TrialState

import postgresql_server
from adapruner.evaluation import compute_prefix
from adapruner.models import find_model, in_fastest_dtype, load_model
from adapruner.planning import kept_counts, reference_budget
from adapruner.search import (
    MOST_PROTECTED_FIRST,
    Objective,
    Search,
    SearchSpace,
    StudyPlace,
    build_subset_family,
    meet_budget,
    sqlite_url,
)
from adapruner.structure import build_structure
from adapruner.surgery import Compensation
from machine import describe
from measured import Measured


def main(
    *,
    measured: Path,
    model: str = "smollm2",
    windows: int = 16,
    trials: int = 24,
    storage: str | None = None,
    study: str | None = None,
    role: Literal["leads", "helps"] = "leads",
) -> None:
    """Prints trials per second and their ratio; `storage`, `study` and `role` are for the processes that it starts."""
    if storage and study:
        search = make_search(measured, model, windows, trials, StudyPlace(storage, study))
        search.run() if role == "leads" else search.help()
        return
    print(describe())
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        storages = {"SQLite": sqlite_url(folder / "study.db")}
        if postgresql_server.find_programs():
            storages["PostgreSQL"] = stack.enter_context(postgresql_server.server())
        for name, url in storages.items():
            rates = []
            for processes in (1, 2):
                place = StudyPlace(url, f"processes-{processes}")
                options = ["--measured", str(measured), "--model", model, "--windows", str(windows)]
                options += ["--trials", str(trials), "--storage", place.url, "--study", place.name]
                started = [
                    subprocess.Popen(
                        ["taskset", "--cpu-list", str(core), sys.executable, __file__, *options, "--role", role],
                        env=os.environ | {"OMP_NUM_THREADS": "1"},
                    )
                    for core, role in zip(range(processes), ("leads", "helps"), strict=False)
                ]
                codes = [process.wait() for process in started]
                assert not any(codes), codes
                rates.append(rate(place, processes))
                print(f"{name}, {processes} process(es): {rates[-1]:.3f} trials per second", flush=True)
            print(f"{name}: {rates[1] / rates[0]:.2f} times as many")


def make_search(measured: Path, model: str, windows: int, trials: int, place: StudyPlace) -> Search:
    """The search of a measured run, over some windows."""
    found = Measured.read(measured)
    config, statistics = found.config, found.statistics
    dense = in_fastest_dtype(load_model(find_model(model)))
    structure = build_structure(dense, config.head_granularity)
    text = found.windows["objective"][:windows]
    budget = reference_budget(config, structure, config.ratio[0])
    family = build_subset_family(statistics, structure, kept_counts(structure, budget))
    meet = partial(meet_budget, structure, statistics, None)
    space = SearchSpace(family, config.samples, 0, budget, "extended", meet=meet)
    compensation, prefix = (
        Compensation("least-squares", found.moments),
        compute_prefix(dense, text, MOST_PROTECTED_FIRST),
    )
    judge = Objective(dense, structure, statistics, text, compensation, prefix)
    return Search(space, judge, trials, 0, place, stops_early=False)


def rate(place: StudyPlace, processes: int) -> float:
    """Finished trials per second, from when every process has begun its first."""
    with place.opened() as study:
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    by_worker: dict[bool, list[float]] = {}
    for trial in finished:
        begun, ended = trial.datetime_start, trial.datetime_complete
        assert begun is not None
        assert ended is not None
        by_worker.setdefault("helper" in trial.user_attrs, []).extend((begun.timestamp(), ended.timestamp()))
    assert len(by_worker) == processes
    # Each by its own trials between the first moment and the last at which all were at it.
    first = max(min(times) for times in by_worker.values())
    last = min(max(times) for times in by_worker.values())
    total = 0.0
    for times in by_worker.values():
        own = sorted(times)
        spans = [(a, b) for a, b in zip(own[::2], own[1::2], strict=True) if a >= first - 1e-3 and b <= last + 1e-3]
        total += len(spans) / (spans[-1][1] - spans[0][0])
    return total


if __name__ == "__main__":
    run(main)
