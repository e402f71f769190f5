"""Imports run one way, and nothing unpickles."""

from __future__ import annotations

import re
from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

import adapruner

SOURCE = Path(adapruner.__file__).parent


def test_data_flows_one_way() -> None:
    config = SOURCE.parents[1] / "pyproject.toml"
    assert lint_imports(config_filename=str(config), no_cache=True) == EXIT_STATUS_SUCCESS


def test_no_pickle_and_no_remote_code() -> None:
    forbidden = re.compile(r"import pickle|torch\.load\(|trust_remote_code\s*=\s*True\s*[,)](?!`)")
    for path in SOURCE.rglob("*.py"):
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
        assert not forbidden.search(code), path
