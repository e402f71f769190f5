"""What `adapruner doctor` says where there is no accelerator; with one, see tests/device."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from huggingface_hub.constants import HF_HUB_CACHE

from adapruner.cli import main
from adapruner.doctor import diagnose


def test_it_says_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPRUNER_DATA", f"{tmp_path}{os.pathsep}{tmp_path / 'none'}")
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "llama-cli"
    program.touch(mode=0o700)
    found = diagnose(device="cpu", benchmark=True)
    assert found.packages["torch"] == version("torch")
    assert found.data == {str(tmp_path): True, str(tmp_path / "none"): False}
    assert found.devices[0].name.startswith("CPU")
    assert found.devices[0].memory == psutil.virtual_memory().total
    assert found.hub_cache == HF_HUB_CACHE
    assert found.engines["llama-cli"]
    assert not found.engines["ollama"]
    assert found.comparison is None


def test_there_is_nothing_to_compare_without_an_accelerator(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", "--benchmark", "--device", "cpu"])
    shown = capsys.readouterr()
    assert version("transformers") in shown.out
    assert "nothing to compare" in shown.err
