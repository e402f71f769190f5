"""Notes who does what, for tests in which several processes work on one run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapruner.run.nodes import measured as _statistics
from adapruner.run.nodes import models as _model
from adapruner.search import Search


def note_who_works() -> None:
    """Leaves a file in the folder NOTES for everything that this process does.

    Trials begin when PROCESSES processes are there: those of the tiny model would be over before another has started.
    """
    judge, measure, recover = Search._run_together, _statistics.measure_in_parts, _model.recover_into
    notes, processes = Path(os.environ["NOTES"]), int(os.environ["PROCESSES"])

    def note(what: str) -> None:
        (notes / f"{what}-{os.getpid()}").touch()

    def judge_slowly(self: Search, study: Any, trials: Any, *others: Any) -> Any:
        trials[0].set_user_attr("worker", os.getpid())
        note("judged")
        while len(list(notes.glob("judged-*"))) < processes:
            time.sleep(0.1)
        time.sleep(0.2)
        return judge(self, study, trials, *others)

    def measure_noting(*arguments: Any, **options: Any) -> Iterator[Any]:
        for part in measure(*arguments, **options):
            note("measured")
            yield part

    def recover_noting(*arguments: Any, **options: Any) -> Any:
        note("trained")
        return recover(*arguments, **options)

    Search._run_together = judge_slowly
    _statistics.measure_in_parts, _model.recover_into = measure_noting, recover_noting
