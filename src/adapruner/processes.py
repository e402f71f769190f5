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
        rank_here: its number among those on this machine, which is that of its GPU.
        count_here: how many there are on this machine.
    """

    rank: int = 0
    count: int = 1
    rank_here: int = 0
    count_here: int = 1

    @property
    def leads(self) -> bool:
        """Whether it does what only one may do."""
        return self.rank == 0


def this_process() -> Process:
    """Read from the variables that launchers set."""
    names = {"rank": "RANK", "count": "WORLD_SIZE", "rank_here": "LOCAL_RANK", "count_here": "LOCAL_WORLD_SIZE"}
    return Process(**{field: int(os.environ[name]) for field, name in names.items() if name in os.environ})
