"""adapruner join"""

from __future__ import annotations

from pathlib import Path

from adapruner import pipeline


def join(run: Path, /, *, storage: str | None = None) -> None:
    """Help a run that another process is at: measure and run trials, until there is nothing left to help with.

    Parameters
    ----------
    run:
        Its run folder, as this machine sees it.
    storage:
        That of the run, if it has one.
    """
    pipeline.join(run, storage)
