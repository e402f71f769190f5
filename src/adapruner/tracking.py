"""Numbers of a run in an experiment tracker, on request: through accelerate, which has one interface for all."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typing_extensions import Self

from adapruner.callbacks import Callback
from adapruner.config import Tracker
from adapruner.errors import AdaPrunerError, reason
from adapruner.progress import StageCost
from adapruner.search import TriedPoint

_PROJECT = "adapruner"
# The argument of each tracker that names a run.
_RUN_NAME: dict[str, str] = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}


def check_tracker(tracker: Tracker | None) -> None:
    """Refuses a tracker that is not installed; imports nothing of it.

    Raises:
        AdaPrunerError: its package is not installed.
    """
    if tracker and find_spec(tracker) is None:
        raise AdaPrunerError(f"`track` {tracker} needs its package: pip install {tracker}")


class Tracking(Callback):
    """Sends numbers to a tracker while it is entered. A failure of the tracker is noted once and does not end the run.

    Args:
        tracker: None sends nothing.
        folder: names the run; TensorBoard's files are in a folder `tensorboard` in it.
        note: called with a line for the user.
    """

    def __init__(self, tracker: Tracker | None, folder: Path, note: Callable[[str], None]) -> None:
        self._tracker, self._folder, self._note = tracker, folder, note
        self._started: Any = None
        self._steps, self._best = itertools.count(), math.inf

    def __enter__(self) -> Self:
        """Begins a run of the tracker.

        Raises:
            AdaPrunerError: it cannot begin.
        """
        if self._tracker:
            try:
                self._started = _start(self._tracker, self._folder)
            except Exception as error:  # trackers raise anything if they are not logged in or find no server
                raise AdaPrunerError(f"`track` {self._tracker} cannot begin a run: {reason(error)}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._send("finish")

    def on_stage_end(self, stage: str, cost: StageCost) -> None:
        self.on_numbers({f"seconds/{stage}": cost.seconds, f"peak memory MiB/{stage}": cost.peak_memory_mib})

    def on_trial(self, trial: TriedPoint) -> None:
        if trial.loss is not None:
            self._best = min(self._best, trial.loss)
            self.on_numbers({"trials/loss": trial.loss, "trials/best loss": self._best})

    def on_numbers(self, numbers: Mapping[str, float]) -> None:
        # MLflow refuses other characters.
        named = {re.sub(r"[^\w./ -]", "-", name): float(value) for name, value in numbers.items()}
        self._send("log", named, step=next(self._steps))

    def _send(self, method: str, *values: Any, **named: Any) -> None:
        try:
            if self._started:
                getattr(self._started, method)(*values, **named)
        except Exception as error:  # the run continues without its tracker
            self._started = None
            self._note(f"{self._tracker} failed and gets no further numbers: {reason(error)}")


def _start(tracker: Tracker, folder: Path) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers log through it
    kind = LOGGER_TYPE_TO_CLASS[tracker]
    if kind.requires_logging_directory:
        started = kind(time.strftime("%Y-%m-%d-%H-%M-%S"), folder / tracker)
    else:
        started = kind(_PROJECT, **{_RUN_NAME[tracker]: folder.absolute().name})
    started.start()
    return started
