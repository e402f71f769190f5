"""Searches and runs by several processes, some of which are killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import adapruner
from adapruner.cli import main
from adapruner.errors import describe_failure
from adapruner.planning import Budget, BudgetError
from adapruner.processes import Process, this_process
from adapruner.search import Candidate, ExtendedSpace, Search, SearchResult, StudyFile, SubsetFamily
from noting_program import note_who_works
from run_helpers import QUICK, fast_starts, flags

OPTIONS = QUICK | {"pool": 24, "objective_windows": 8}


def launch(processes: int, function: Callable[..., None], *arguments: Any) -> None:
    """What `torchrun --standalone` does, with processes that are forked from one which has imported everything."""
    fast_starts()
    config = LaunchConfig(
        1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver", max_restarts=0
    )
    elastic_launch(config, function)(*arguments)


def a_search(folder: Path, process: Process, judged: Callable[[], None] = lambda: None) -> Search:
    """Candidates differ in a smooth loss, some cannot be met, and bad ones are stopped."""
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(12, 30, generator=generator).double()
    subsets = SubsetFamily(importance @ importance.T, torch.randn(12, 4, generator=generator).double())

    def judge(candidate: Candidate) -> Iterator[Tensor]:
        judged()
        allocation = candidate.budget.allocation
        if allocation.protect_first > 4 and allocation.tilt != 0:
            raise BudgetError("cannot be reached")
        noise = torch.rand(24, generator=torch.Generator().manual_seed(sum(candidate.samples))).double() / 100
        yield from (noise + allocation.tilt**2 + candidate.point.weights.get("fine_first", 0.0)).split(8)

    space = ExtendedSpace(subsets, 4, 0, Budget(0.2))
    return Search(space, judge, 22, 0, StudyFile(folder / "study.jsonl", "a"), process=process)


def search_in(folder: Path, killed: tuple[int, str, int] | None = None) -> None:
    """In each process. The one of a rank may be killed when it judges or keeps a trial once more, after so many."""
    process, add_trial = this_process(), optuna.Study.add_trial
    rank, at, left = killed or (-1, "", 0)

    def count(what: str) -> None:
        nonlocal left
        if (process.rank, what) == (rank, at):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def keep(self: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        count("keep")
        add_trial(self, trial)

    optuna.Study.add_trial = keep
    torch.set_num_threads(1)
    with process.connected(torch.device("cpu")):
        a_search(folder, process, lambda: count("judge")).run()


def result_in(folder: Path) -> SearchResult:
    return a_search(folder, Process()).result()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_same_processes_find_the_same_after_any_kill(processes: int, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("undisturbed", "killed")]
    for folder in folders:
        folder.mkdir()
    launch(processes, search_in, folders[0])
    undisturbed = result_in(folders[0])
    assert undisturbed.stopped_early
    for killed in ((processes - 1, "judge", 1), (0, "keep", 7), (0, "judge", 3), (0, "keep", 1)):
        with pytest.raises(ChildFailedError):
            launch(processes, search_in, folders[1], killed)
    launch(processes, search_in, folders[1])
    assert result_in(folders[1]) == undisturbed
    # By another number of processes, a search is another, and one that was begun is completed.
    lines = (folders[0] / "study.jsonl").read_text().splitlines(keepends=True)
    (folders[1] / "study.jsonl").write_text("".join(lines[: 1 + 13]))
    launch(processes % 3 + 1, search_in, folders[1])
    other = result_in(folders[1])
    assert len(other.points) == len(undisturbed.points) == 22
    assert other != undisturbed


def outlive(folder: Path) -> None:
    """In each process; the second one is killed."""
    process = this_process()
    with process.connected(torch.device("cpu")):
        process.wait()
        if not process.leads:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            process.gathered(None)
        except RuntimeError as error:
            (folder / "said.txt").write_text(str(describe_failure(error, "")))


def test_a_process_says_that_another_one_has_ended(tmp_path: Path) -> None:
    with pytest.raises(ChildFailedError):
        launch(2, outlive, tmp_path)
    assert (tmp_path / "said.txt").read_text() == "another process of the run has ended"


def prune_in(folder: Path, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    note_who_works(folder)
    try:
        main(arguments)
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"exit code {ended.code}") from ended


def test_processes_started_together_measure_search_and_train(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    recovery = {"steps": 2, "batch_size": 4, "micro_batch_size": 1, "seq_len": 16}
    options = [*flags(OPTIONS | {"trials": 12}), "--recover", text_file, *flags(recovery, "recovery.")]
    command = ["prune", model_folder, "-o", output, "--calibration", text_file, *options]
    launch(2, prune_in, tmp_path, [str(word) for word in command])
    result = json.loads((output / "result.json").read_text())
    assert result["recovery"]["steps"] == 2
    assert len(result["search"]["points"]) == 12
    for what in ("measured", "judged", "trained"):
        assert len(list(tmp_path.glob(f"{what}-*"))) == 2
    assert adapruner.load(output / "recovered").num_parameters() > 0
