"""Processes that a launcher has started together."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import adapruner
from adapruner.base.errors import AdaPrunerError, describe_failure
from adapruner.base.processes import Process, this_process
from adapruner.model.loading import resolve_device
from run_helpers import exit_code, fast_starts, flags

VARIABLES = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_a_standalone_process_leads(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert this_process() == Process(0, 1, 0, 1)
    assert this_process().leads
    # Variables that were left in a shell do not count.
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert this_process() == Process()


def test_every_process_on_a_machine_uses_its_own_gpu(monkeypatch):
    for name, value in {**VARIABLES, "TORCHELASTIC_RUN_ID": "a"}.items():
        monkeypatch.setenv(name, value)
    assert this_process() == Process(5, 8, 1, 4)
    assert not this_process().leads
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    current = list[torch.device]()
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(set_device=current.append))
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:1")
    assert resolve_device("cuda:0") == torch.device("cuda:0") == current[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="cannot fork")
def test_a_process_ends_after_its_launcher_was_killed():
    """It has the end of a pipe, which is closed when it ends."""
    program = (
        "import os, time; from adapruner.base.processes import end_with_parent\n"
        "if not os.fork(): end_with_parent(); print('started', flush=True)\n"
        "time.sleep(60)"
    )
    source = Path(__file__).parent.parent / "src"
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=source)
    assert launcher.stdout
    assert launcher.stdout.readline() == "started\n"
    launcher.kill()
    launcher.communicate(timeout=20)


def launch(processes: int, function: Callable[..., None], *arguments: Any) -> None:
    """What `torchrun --standalone` does, with processes that are forked from one which has imported everything."""
    fast_starts()
    config = LaunchConfig(
        1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver", max_restarts=0
    )
    elastic_launch(config, function)(*arguments)


def recover_in(folder: Path, arguments: list[str]) -> None:
    """In each process; leaves a file with the number of those that trained together."""
    torch.set_num_threads(1)
    if exit_code(arguments):
        raise RuntimeError("recovery failed")
    (folder / f"process-{this_process().rank}").write_text(str(distributed.get_world_size()))


def test_processes_started_together_train(model_folder, text_file, tmp_path):
    output = tmp_path / "tuned"
    options = {"steps": 2, "batch_size": 4, "micro_batch_size": 1, "seq_len": 16, "train": "full", "json": True}
    command = ["recover", str(model_folder), "--data", str(text_file), "-o", str(output), *flags(options)]
    launch(2, recover_in, tmp_path, command)
    assert [(tmp_path / f"process-{rank}").read_text() for rank in range(2)] == ["2", "2"]
    assert json.loads((output / "recovery.json").read_text())["steps"] == 2
    assert adapruner.load(output).num_parameters() > 0


def test_several_processes_do_not_prune(model_folder, text_file, tmp_path, monkeypatch):
    for name, value in {**VARIABLES, "TORCHELASTIC_RUN_ID": "a"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AdaPrunerError, match=r"runs in one process, and 8 were started: .* adapruner recover"):
        adapruner.prune(str(model_folder), output=tmp_path / "run", calibration=str(text_file))
    assert not (tmp_path / "run").exists()


def outlive(folder: Path) -> None:
    """In each process; the second one is killed, and the first one finishes though the launcher ends it too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    distributed.init_process_group("gloo")
    distributed.barrier()
    if not this_process().leads:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        distributed.barrier()
    except RuntimeError as error:
        (folder / "said.txt").write_text(str(describe_failure(error, "")))
        os._exit(1)


def test_a_process_says_that_another_one_has_ended(tmp_path):
    with pytest.raises(ChildFailedError):
        launch(2, outlive, tmp_path)
    assert (tmp_path / "said.txt").read_text() == "another process of the run has ended"
