"""The report of a run, also while others are at it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from adapruner.report import write_report
from adapruner.run_folder import RunFolder

_SECONDS_BETWEEN_REPORTS = 5


def write_reports(output: str | Path, watch: bool = False) -> Iterator[Path]:
    """Writes the report of a run, finished or not; yields its path each time.

    Args:
        output: the run folder.
        watch: write it every few seconds as long as a process is at the run, and once more when it has ended.

    Raises:
        AdaPrunerError: the folder holds no run, or cannot be written.
    """
    run = RunFolder(Path(output))
    while watch and run.is_led():
        yield write_report(run, _SECONDS_BETWEEN_REPORTS)
        time.sleep(_SECONDS_BETWEEN_REPORTS)
    yield write_report(run)
