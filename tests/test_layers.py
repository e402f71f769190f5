"""Imports run one way, and nothing unpickles."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import adapruner

SOURCE = Path(adapruner.__file__).parent


def test_data_flows_one_way() -> None:
    """In a process of its own: import-linter sets up the logging of the one it is in."""
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    linted = subprocess.run([*lint, "--no-cache"], cwd=SOURCE.parents[1], capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


def test_no_pickle_and_no_remote_code() -> None:
    forbidden = re.compile(r"import pickle|torch\.load\(|trust_remote_code\s*=\s*True\s*[,)](?!`)")
    for path in SOURCE.rglob("*.py"):
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
        assert not forbidden.search(code), path
