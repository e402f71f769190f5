"""Callbacks for a run in progress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from adapruner.progress import StageCost
from adapruner.search import TriedPoint


class Callback:
    """Methods that are called during a run; override those that you need. Of several processes, only the first calls.

    An exception in a method ends the run; call `adapruner.prune` again to resume it.
    """

    def on_stage_begin(self, stage: str) -> None:
        """A stage begins: `measuring`, `searching`, `compensating`, …"""

    def on_stage_end(self, stage: str, cost: StageCost) -> None:
        """A stage has ended, with its seconds and peak memory. Finished stages of a resumed run are not repeated."""

    def on_trial(self, trial: TriedPoint) -> None:
        """A trial has finished; also called for trials of an earlier call, in the order in which they were begun."""

    def on_numbers(self, numbers: Mapping[str, float]) -> None:
        """Numbers by name: those that the Trainer logs in every step of a fine-tuning, `recovery/loss`, …, and at the
        end the perplexities of all models."""


def tell(callbacks: Iterable[Callback], numbers: Mapping[str, float]) -> None:
    """Calls `on_numbers` of each."""
    for callback in callbacks:
        callback.on_numbers(numbers)
