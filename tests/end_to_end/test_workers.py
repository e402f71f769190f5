"""Runs that several processes work on, some of which are killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import adapruner
import noting_program
import postgresql_server
from adapruner import AdaPrunerError
from adapruner.cli import main
from adapruner.graph import RunFolder
from adapruner.search import StudyPlace, _place, sqlite_url
from adapruner.search._space import START
from run_helpers import QUICK, fast_starts, flags, said_by, start_main

OPTIONS = QUICK | {"pool": 24, "objective_windows": 8}
del OPTIONS["trials"]


@pytest.fixture(scope="module", params=os.environ.get("ADAPRUNER_TEST_STORAGES", "sqlite").split(","))
def storage(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "sqlite":
        yield None
        return
    if postgresql_server.find_programs() is None:
        pytest.skip("PostgreSQL is not installed")
    with postgresql_server.server() as url:
        yield url


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., BaseProcess]]:
    """Starts the command line in another process; `together`: how many begin their trials together."""
    with contextlib.ExitStack() as started:

        def start_one(*arguments: object, together: int = 1) -> BaseProcess:
            command = [str(part) for part in arguments]
            environment = {"NOTES": str(tmp_path), "PROCESSES": str(together)}
            process = start_main(noting_program.note_who_works, (), command, tmp_path, **environment)
            started.callback(process.join)
            started.callback(process.kill)
            return process

        yield start_one


def prune_command(model: Path, output: Path, text: Path, trials: int, *others: object) -> list[object]:
    return ["prune", model, "-o", output, "--calibration", text, "--trials", trials, *flags(OPTIONS), *others]


def trials_of(output: Path, storage: str | None) -> list[FrozenTrial]:
    run = RunFolder(output)
    record = run.record("search.json")
    if record is None or not (storage or run.study.is_file()):
        return []
    with StudyPlace(storage or sqlite_url(run.study), record.key).opened() as study:
        return study.get_trials(deepcopy=False)


def wait_until(condition: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.2)


def test_workers_join_and_a_killed_one_costs_its_trial_alone(
    storage: str | None, start: Callable[..., Any], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    options = ["--storage", storage] if storage else []

    def trials_by(process: Any, state: TrialState) -> list[FrozenTrial]:
        trials = trials_of(output, storage)
        return [trial for trial in trials if trial.state == state and trial.user_attrs.get("worker") == process.pid]

    leader = start(*prune_command(model_folder, output, text_file, 24, *options), together=3)
    # Before the search begins.
    wait_until(lambda: (output / "windows.safetensors").is_file())
    helpers = [start("join", output, *options, together=3) for _ in range(2)]
    wait_until(lambda: trials_by(helpers[0], TrialState.COMPLETE) and trials_by(helpers[0], TrialState.RUNNING))
    helpers[0].kill()
    for process, stage in ((leader, "searching"), (helpers[1], "running trials")):
        process.join(timeout=300)
        said = said_by(process, tmp_path)
        assert process.exitcode == 0, said
        assert f"{stage}: done in" in said
    trials = trials_of(output, storage)
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(finished) >= 24
    # The trial of the one that was killed; the run did not wait for it.
    assert sum(trial.state in (TrialState.RUNNING, TrialState.FAIL) for trial in trials) <= 1
    assert len(trials_by(helpers[1], TrialState.COMPLETE)) > 3
    starts = [trial.user_attrs[START] for trial in finished if START in trial.user_attrs]
    result = json.loads((output / "result.json").read_text())
    assert len(starts) == len(set(starts)) >= result["search"]["starting_points"] - 1
    assert adapruner.load(output / "model").num_parameters() > 0


def work_beside_others(notes: Path, arguments: list[str]) -> None:
    """What the launcher runs in each process, which it has given its number."""
    os.environ.update(NOTES=str(notes), PROCESSES="2")
    torch.set_num_threads(1)
    noting_program.note_who_works()
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
    trained = ["--recover", text_file, *flags(recovery, "recovery.")]
    command = [str(part) for part in prune_command(model_folder, output, text_file, 12, *trained)]
    fast_starts()
    # What torchrun --standalone does, with processes that are forked from one which has imported everything.
    config = LaunchConfig(
        1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver", max_restarts=0
    )
    elastic_launch(config, work_beside_others)(tmp_path, command)
    result = json.loads((output / "result.json").read_text())
    assert result["recovery"]["steps"] == 2
    processes = {trial.user_attrs["worker"] for trial in trials_of(output, None)}
    assert len(processes) == 2
    for what in ("measured", "trained"):
        assert {path.name for path in tmp_path.glob(f"{what}-*")} == {f"{what}-{process}" for process in processes}
    assert adapruner.load(output / "recovered").num_parameters() > 0


def test_a_second_command_in_a_running_folder_is_refused(
    start: Callable[..., Any], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    leader = start(*prune_command(model_folder, output, text_file, 500))
    wait_until(RunFolder(output).is_running)
    with pytest.raises(AdaPrunerError, match="another command is running in"):
        adapruner.prune(str(model_folder), output=output, calibration=str(text_file), trials=500, **OPTIONS)
    assert leader.is_alive()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Path:
    output = tmp_path_factory.mktemp("runs") / "a"
    return adapruner.prune(str(model_folder), output=output, calibration=str(text_file), trials=5, **OPTIONS).output


@pytest.fixture
def searching(finished: Path, tmp_path: Path) -> Iterator[RunFolder]:
    """A run in progress, whose search has just begun."""
    shutil.copytree(finished, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    run.study.unlink()
    record = run.record("search.json")
    assert record is not None
    with run.locked():
        run.begin("search.json", record.model_copy(update={"files": None}))
        with StudyPlace(sqlite_url(run.study), record.key).opened():
            pass
        yield run


def test_a_worker_runs_the_trials_that_are_wanted(searching: RunFolder) -> None:
    for _ in range(2):
        adapruner.join(searching.path)
        # Proposals that cannot be met are replaced by the nearest that can.
        assert [trial.state for trial in trials_of(searching.path, None)] == [TrialState.COMPLETE] * 5


@pytest.mark.parametrize(
    ("leaf", "value", "change"),
    [
        ("precision", {"device": "cuda"}, "another precision device|another device"),
        ("precision", {"dtype of trials": "torch.float16"}, "another dtype of trials"),
        ("model", {"weights": "others"}, "another model"),
    ],
)
def test_a_worker_that_would_compute_other_numbers_is_refused(
    searching: RunFolder, leaf: str, value: dict[str, str], change: str
) -> None:
    record = searching.record("search.json")
    assert record is not None
    now = record.leaves[leaf]
    leaves = record.leaves | {leaf: now | value if isinstance(now, dict) else value}
    searching.begin("search.json", record.model_copy(update={"leaves": leaves}))
    with pytest.raises(AdaPrunerError, match=f"would compute other numbers than the run: ({change})"):
        adapruner.join(searching.path)
    assert trials_of(searching.path, None) == []


def test_joining_where_nothing_runs_is_refused(finished: Path, tmp_path: Path) -> None:
    for output in (tmp_path, finished):
        with pytest.raises(AdaPrunerError, match="no run is in progress in"):
            adapruner.join(output)


@pytest.mark.parametrize("url", ["postgresql://nobody@127.0.0.1:1/none", "oracle", "nosuch://here"])
def test_databases_that_cannot_be_opened_are_refused(
    url: str, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdaPrunerError, match=r"database|`storage`"):
        adapruner.prune(str(model_folder), output=tmp_path / "run", calibration=str(text_file), storage=url, **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_tables_may_be_created_by_two_processes_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The slower one is refused by the database, and then finds them."""
    create, refused = _place._Storage.__init__, []

    def refuse_once(self: Any, *arguments: Any, **options: Any) -> None:
        create(self, *arguments, **options)
        if not refused:
            refused.append(IntegrityError("INSERT", {}, Exception("UNIQUE constraint failed: alembic_version.x")))
            raise refused[0]

    monkeypatch.setattr(_place._Storage, "__init__", refuse_once)
    StudyPlace(sqlite_url(tmp_path / "study.db"), "a").check()
    assert refused
