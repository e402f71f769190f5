"""The processes that `torchrun` or `accelerate launch` started together."""

from __future__ import annotations

import os
from dataclasses import dataclass

from adapruner.errors import AdaPrunerError


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
    """Read from the variables that launchers set.

    Raises:
        AdaPrunerError: they say what cannot be.
    """
    process = Process(
        _variable("RANK", 0), _variable("WORLD_SIZE", 1), _variable("LOCAL_RANK", 0), _variable("LOCAL_WORLD_SIZE", 1)
    )
    # Not every launcher says how many there are on a machine.
    if process.rank >= process.count or ("LOCAL_WORLD_SIZE" in os.environ and process.rank_here >= process.count_here):
        raise AdaPrunerError(
            f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE say {process.rank} of {process.count}, here"
            f" {process.rank_here} of {process.count_here}: unset them, or leave them to torchrun"
        )
    return process


def _variable(name: str, default: int) -> int:
    value = os.environ.get(name)
    if value is None:
        return default
    if not value.isdecimal():
        raise AdaPrunerError(f"the environment says {name}={value!r}, no number: unset it, or leave it to torchrun")
    return int(value)
