"""The processes that `torchrun` or `accelerate launch` started together."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """One of the processes that were started together.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether it does what only one may do."""
        return self.rank == 0


def this_process() -> Process:
    """Read from the variables that launchers set."""
    return Process(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
