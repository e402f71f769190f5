"""adapruner join"""

from __future__ import annotations

from pathlib import Path


def join(run: Path, /, *, storage: str | None = None, device: str = "auto") -> None:
    """Join a run in progress as an additional worker.

    Parameters
    ----------
    run:
        Folder of the run, as seen by this machine.
    storage:
        Storage of the run, if it was started with one.
    device:
        Device of this worker: auto, cpu, cuda, cuda:1, …
    """
    from adapruner import pipeline

    pipeline.join(run, storage, device)
