"""adapruner join"""

from __future__ import annotations

from pathlib import Path

from adapruner import pipeline


def join(run: Path, /, *, storage: str | None = None, device: str = "auto") -> None:
    """Help a run that another process is at: measure and run trials, until there is nothing left to help with.

    Parameters
    ----------
    run:
        Its run folder, as this machine sees it.
    storage:
        That of the run, if it has one.
    device:
        Where this process runs: auto, cpu, cuda, cuda:1, …
    """
    pipeline.join(run, storage, device)
