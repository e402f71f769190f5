"""GGUF files with damaged tensor infos; `benchmarks/gguf_fuzz.py` tries thousands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import gguf_fuzz


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_damaged_file_is_loaded_or_refused_in_one_line_and_little_memory(tmp_path: Path) -> None:
    outcomes, violations = gguf_fuzz.fuzz(tmp_path, 40, 0)
    assert violations == []
    assert outcomes.total() >= 35
    assert len(outcomes) >= 8


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", gguf_fuzz.CONFIG)
def test_a_size_of_zero_gives_no_warning(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_fuzz.resized(gguf_fuzz.write_healthy(path), name, 0).packed())
    gguf_fuzz.outcome(path)
