"""What launchers say in the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adapruner.models import resolve_device
from adapruner.processes import Process, this_process

VARIABLES = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_a_standalone_process_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert this_process() == Process(0, 1, 0, 1)
    assert this_process().leads
    # Variables that were left in a shell do not count.
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert this_process() == Process()


def test_every_process_on_a_machine_uses_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_process_ends_after_its_launcher_was_killed() -> None:
    """It has the end of a pipe, which is closed when it ends."""
    program = (
        "import os, time; from adapruner.processes import end_with_parent\n"
        "if not os.fork(): end_with_parent(); print('started', flush=True)\n"
        "time.sleep(60)"
    )
    source = Path(__file__).parent.parent / "src"
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=source)
    assert launcher.stdout
    assert launcher.stdout.readline() == "started\n"
    launcher.kill()
    launcher.communicate(timeout=20)
