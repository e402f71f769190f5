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
    assert len(outcomes) > 8
