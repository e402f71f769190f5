"""Searches that several processes work on, some of which are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

import adapruner
import postgresql_server
from adapruner import AdaPrunerError, PruneConfig
from adapruner.job import prepare
from adapruner.measurement import Statistics, measure, measure_in_parts
from adapruner.progress import Reporter
from adapruner.run_folder import RunFolder
from adapruner.search import StudyPlace
from adapruner.stages import help_measuring, stage_load, stage_measure

OPTIONS = {"ratio": 0.1, "pool": 24, "samples": 4, "objective_windows": 8, "seq_len": 16, "round_to": 1}


@pytest.fixture(scope="module", params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "journal":
        yield None
        return
    if postgresql_server.find_programs() is None:
        pytest.skip("PostgreSQL is not installed")
    with postgresql_server.server() as url:
        yield url


# Trials of the tiny model are over before a helper is there.
SLOWLY = """
import time
from adapruner.cli import main
from adapruner.search import Objective

judge = Objective.__call__

def judge_slowly(*arguments):
    time.sleep(0.3)
    yield from judge(*arguments)

Objective.__call__ = judge_slowly
main()
"""


@contextlib.contextmanager
def start(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait(process: subprocess.Popen[bytes]) -> str:
    _, error = process.communicate(timeout=120)
    return error.decode()


def prune_command(model: Path, output: Path, text: Path, trials: int, storage: str | None) -> list[object]:
    flags = [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", value)]
    flags += ["--storage", storage] if storage else []
    return ["prune", model, "-o", output, "--calibration", text, "--trials", trials, *flags]


def trials_of(output: Path, storage: str | None) -> list[FrozenTrial]:
    with StudyPlace(output, storage).opened() as study:
        return study.get_trials(deepcopy=False)


def wait_until(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.2)


def test_a_helper_helps_and_a_killed_one_costs_its_trial_alone(
    storage: str | None, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    options = ["--storage", storage] if storage else []

    def of(process: subprocess.Popen[bytes], state: TrialState) -> list[FrozenTrial]:
        trials = trials_of(output, storage) if (output / "study.json").is_file() else []
        own = f"-{process.pid}-"
        return [trial for trial in trials if trial.state == state and own in trial.user_attrs.get("worker", "")]

    with contextlib.ExitStack() as started:
        leader = started.enter_context(start(*prune_command(model_folder, output, text_file, 70, storage)))
        wait_until(lambda: (output / "windows.safetensors").is_file())
        helpers = [started.enter_context(start("join", output, *options)) for _ in range(2)]
        wait_until(lambda: of(helpers[0], TrialState.COMPLETE) and of(helpers[0], TrialState.RUNNING))
        helpers[0].send_signal(signal.SIGKILL)
        assert "done in" in wait(leader)
        assert "helping to search: done" in wait(helpers[1])
    assert (leader.returncode, helpers[1].returncode) == (0, 0)
    by_state = [trial.state for trial in trials_of(output, storage)]
    assert by_state.count(TrialState.COMPLETE) >= 70
    # One trial was lost with the helper that was killed; the run was not waiting for it.
    assert by_state.count(TrialState.FAIL) <= 1
    assert by_state.count(TrialState.RUNNING) <= 1 - by_state.count(TrialState.FAIL)
    assert len(of(helpers[1], TrialState.COMPLETE)) > 5
    # Every starting point was tried to its end once, whoever had it first.
    finished = [trial for trial in trials_of(output, storage) if trial.state == TrialState.COMPLETE]
    starts = sorted(trial.user_attrs["start"] for trial in finished if "start" in trial.user_attrs)
    assert starts == list(range(10))
    assert adapruner.load(output / "model").num_parameters() > 0


def test_processes_started_together_measure_search_and_train(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = prune_command(model_folder, output, text_file, 20, None)
    recovery = {"steps": 2, "batch-size": 4, "micro-batch-size": 1, "seq-len": 16}
    command += ["--recover", str(text_file)]
    command += [part for name, value in recovery.items() for part in (f"--recovery.{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "adapruner"]
        + [str(part) for part in command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((output / "result.json").read_text())
    assert result["recovery"]["steps"] == 2
    workers = {trial.user_attrs["worker"] for trial in trials_of(output, None)}
    assert len(workers) == 2
    assert adapruner.load(output / "recovered").num_parameters() > 0


def test_what_a_helper_has_measured_is_not_measured_again(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def noting(*arguments: Any, starts: Iterable[int], **named: Any) -> Iterator[tuple[int, Statistics]]:
        for start, statistics in measure_in_parts(*arguments, starts=starts, **named):
            asked.append(start)
            yield start, statistics

    monkeypatch.setattr("adapruner.stages._measuring.measure_in_parts", noting)
    config = PruneConfig(model=str(model_folder), calibration=str(text_file), **OPTIONS)
    run = RunFolder(tmp_path)
    job = prepare(config, run, None)
    run.create(config, overwrite=False)
    model, pool = stage_load(job, Reporter()), job.windows["pool"]
    run.save_windows(job.windows)
    run.statistics_parts.mkdir()
    alone = measure(model, job.structure, pool)
    for start in (4, 12):
        run.save_part(alone.select(range(start, start + 4)), run.statistics_parts / f"{start:06}-4.safetensors")
    help_measuring(job, model, pool, 0.5, Reporter())
    assert asked == [16, 20, 0, 8]
    torch.testing.assert_close(stage_measure(job, model, pool, None, Reporter()).taylor, alone.taylor)
    assert len(asked) == 4


def test_who_helps_where_nobody_works_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(AdaPrunerError, match="no process is at a run in"):
        adapruner.join(tmp_path)


def test_a_run_that_somebody_is_at_is_left_alone(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    command = prune_command(model_folder, tmp_path, text_file, 500, None)
    with start(*command):
        wait_until(lambda: (tmp_path / "study.journal").is_file())
        with start(*command) as second:
            assert "another process is at the run" in wait(second)
            assert second.returncode == 2


def test_the_place_of_the_trials_is_kept(tmp_path: Path) -> None:
    with StudyPlace(tmp_path).opened():
        pass
    with pytest.raises(AdaPrunerError, match="are in its journal and not in sqlite:///"):
        StudyPlace(tmp_path, f"sqlite:///{tmp_path}/trials.db").check()
    other = StudyPlace(tmp_path / "other", f"sqlite:///{tmp_path}/trials.db")
    other.folder.mkdir()
    with other.opened():
        pass
    with pytest.raises(AdaPrunerError, match=r"are in sqlite:///.* and not in its journal"):
        StudyPlace(tmp_path / "other").check()
    assert len(optuna.get_all_study_names(f"sqlite:///{tmp_path}/trials.db")) == 1


@pytest.mark.parametrize("url", ["postgresql://nobody@127.0.0.1:1/none", "oracle", "nosuch://here"])
def test_databases_that_cannot_be_reached_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(AdaPrunerError, match="--storage"):
        StudyPlace(tmp_path, url).check()
