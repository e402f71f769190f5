"""How much faster several processes search than one, on simulated work.

    python benchmarks/workers.py

A trial sleeps for every window, so that two cores are enough for three processes; the slowest candidates take three
times as long as the fastest. For each number of processes, one search stops bad trials and one does not.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from cyclopts import run
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from adapruner.planning import Budget, Profile
from adapruner.processes import this_process
from adapruner.search import Candidate, ExtendedSpace, Search, StudyFile, SubsetFamily
from machine import describe

WINDOWS, BATCH = 64, 4


def main(*, counts: Sequence[int] = (1, 2, 3), trials: int = 48, seconds: float = 0.8) -> None:
    """Prints the time of every search, and its speed-up over one process as a share of the ideal one.

    Args:
        counts: of processes.
        seconds: that an average trial sleeps if it sees all windows.
    """
    print(describe())
    for stops_early in (False, True):
        print("bad trials stopped" if stops_early else "no trial stopped")
        times = {count: _time(count, trials, seconds, stops_early) for count in counts}
        for count, took in times.items():
            speed_up = times[counts[0]] / took
            print(
                f"  {count} processes: {took:.1f} s, {speed_up:.2f} times as fast, {speed_up / count:.2f} of the ideal"
            )


def _time(count: int, trials: int, seconds: float, stops_early: bool) -> float:
    """Seconds that a search by so many processes takes once they have started."""
    config = LaunchConfig(1, 1, count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    with tempfile.TemporaryDirectory() as folder:
        launched = elastic_launch(config, _search)(Path(folder, "study.jsonl"), trials, seconds, stops_early)
    return float(launched[0])


def _search(file: Path, trials: int, seconds: float, stops_early: bool) -> float:
    """What each process does."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(12, 30, generator=generator).double()
    subsets = SubsetFamily(importance @ importance.T, torch.randn(12, 4, generator=generator).double())
    space = ExtendedSpace(subsets, 4, 0, Budget(0.2))
    own_texts = torch.sin(torch.arange(WINDOWS).double()) * 3

    def judge(candidate: Candidate) -> Iterator[Tensor]:
        drawn = hashlib.sha256(candidate.model_dump_json().encode()).digest()
        noise = torch.randn(WINDOWS, generator=torch.Generator().manual_seed(drawn[0])).double()
        profile = candidate.budget.allocation
        assert isinstance(profile, Profile)
        loss = (profile.tilt - 0.2) ** 2 + candidate.point.weights.get("fine_first", 0.0)
        for losses in (own_texts + 0.1 * noise + loss).split(BATCH):
            time.sleep(seconds * (0.5 + drawn[1] / 255) * BATCH / WINDOWS)
            yield losses

    process = this_process()
    with process.connected(torch.device("cpu")):
        search = Search(space, judge, trials, 0, StudyFile(file, "a"), stops_early=stops_early, process=process)
        process.wait()
        begun = time.perf_counter()
        search.run()
        return time.perf_counter() - begun


if __name__ == "__main__":
    run(main)
