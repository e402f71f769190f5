"""Options and outcome of the runs that tests share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapruner.artifacts import Record, are_as_written

# Files that say how long something took, or show it.
WITH_TIMES = ("result.json", "report.html", "recovery.json")
# Of a run that takes little time.
RUN_OPTIONS: dict[str, Any] = {
    "ratio": 0.1,
    "pool": 12,
    "samples": 4,
    "objective_windows": 6,
    "seq_len": 16,
    "trials": 9,
    "protect_first": 1,
    "protect_last": 1,
    "round_to": 1,
}

_KILLED = """
import os, pkgutil, signal
from adapruner.cli import main

target, name, left = pkgutil.resolve_name("{target}"), "{name}", {calls}
original = getattr(target, name)

def counted(*arguments, **named):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **named)

setattr(target, name, counted)
main()
"""


def run_killed(target: str, name: str, calls: int, arguments: list[str], environment: Mapping[str, str]) -> None:
    """Runs the command line in a process that is killed when it calls a function again, after so many calls.

    Args:
        target: the module or class that the function is in.
    """
    program = [sys.executable, "-c", _KILLED.format(target=target, name=name, calls=calls), *arguments]
    killed = subprocess.run(program, env=environment, capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()


def assert_same_artifacts(run: Path, undisturbed: Path) -> None:
    """Two finished runs made the same artifacts from the same inputs, byte by byte but for the times in them."""
    made = [
        {path.name: Record.model_validate_json(path.read_bytes()) for path in (folder / "keys").iterdir()}
        for folder in (run, undisturbed)
    ]
    assert made[0].keys() == made[1].keys()
    for name, record in made[0].items():
        assert record.key == made[1][name].key, name
        contents = [
            {file: stamp for file, stamp in (one.files or {}).items() if Path(file).name not in WITH_TIMES}
            for one in (record, made[1][name])
        ]
        assert record.files, name
        assert contents[0] == contents[1], name
        assert are_as_written(record.files, run), name
    results = [
        json.loads((folder / "result.json").read_text()) | {"stages": None, "recovery": None}
        for folder in (run, undisturbed)
    ]
    assert results[0] == results[1]
    assert not (run / "unfinished").exists()
    assert not [path for path in run.rglob("*") if "partial" in path.name]
