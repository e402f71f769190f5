"""Notes who does what, for tests in which several processes work on one run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adapruner.run.nodes import measured, models
from adapruner.search import Objective


def note_who_works(folder: Path) -> None:
    """Leaves a file in the folder for everything that this process does."""
    judge, measure, recover = Objective.__call__, measured.measure_in_parts, models.recover_into

    def noting(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            (folder / f"{what}-{os.getpid()}").touch()
            return function(*arguments, **options)

        return noted

    def measure_noting(*arguments: Any, **options: Any) -> Iterator[Any]:
        for part in measure(*arguments, **options):
            (folder / f"measured-{os.getpid()}").touch()
            yield part

    Objective.__call__ = noting("judged", judge)
    measured.measure_in_parts, models.recover_into = measure_noting, noting("trained", recover)
