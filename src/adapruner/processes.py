"""The processes that `torchrun` or `accelerate launch` started together."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as distributed

T = TypeVar("T")

# The other processes wait while the first one measures, searches and saves.
_LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Process:
    """One of the processes that were started together.

    Attributes:
        rank: its number, from 0.
        count: the number of processes.
        rank_here: its number among those on this machine, which is the number of its GPU.
        count_here: the number of processes on this machine.
    """

    rank: int = 0
    count: int = 1
    rank_here: int = 0
    count_here: int = 1

    @property
    def leads(self) -> bool:
        """True for the process that does the work of only one process."""
        return self.rank == 0

    @property
    def shares_weights(self) -> bool:
        """True if the launcher asks for FSDP, which shares the weights of models out over several GPUs."""
        return self.count > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")

    @contextlib.contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """Connects the processes while this lasts, so that they can wait for each other and train together."""
        if self.count == 1 or distributed.is_initialized():
            yield
            return
        backend = "gloo"
        if device.type != "cpu":
            backend = f"cpu:gloo,{device.type}:{distributed.get_default_backend_for_device(device)}"
        end_with_parent()
        distributed.init_process_group(backend, timeout=_LONGEST_WAIT)
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def wait(self) -> None:
        """Waits for all processes at a barrier."""
        self.from_first(None)

    def from_first(self, value: T) -> T:
        """The value of the first process."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks; in every process."""
        if self.count == 1:
            return [value]
        values = [value] * self.count
        distributed.all_gather_object(values, value)
        return values


def end_with_parent() -> None:
    """Ends this process soon after its parent has ended, as a kill would: a launcher that is killed ends nothing."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def this_process() -> Process:
    """This process, from the environment variables of the launcher that started it. Variables that are left in a shell
    are ignored."""
    if not distributed.is_torchelastic_launched():
        return Process()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Process(*(int(os.environ[name]) for name in names))
