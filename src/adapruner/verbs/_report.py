"""The report of a run, also while it is in progress."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from adapruner import report
from adapruner.graph import RunFolder
from adapruner.paths import given_path
from adapruner.run.options import register_extensions

_SECONDS_BETWEEN_REPORTS = 5


def write_reports(output: str | Path, watch: bool = False) -> Iterator[Path]:
    """Writes the report of a run, finished or not; yields its path each time.

    Args:
        output: the run folder.
        watch: write it every few seconds while the run is in progress, and once more when it has ended.

    Raises:
        AdaPrunerError: the folder holds no run, or cannot be written.
    """
    run = RunFolder(given_path(output))
    register_extensions(run.read_config())
    while watch and run.is_running():
        yield report.write_report(run, _SECONDS_BETWEEN_REPORTS)
        time.sleep(_SECONDS_BETWEEN_REPORTS)
    yield report.write_report(run)
