"""The processes that a launcher started with this one, and state of PyTorch that belongs to the program."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
import torch.distributed as distributed


def accelerator_in_use() -> tuple[str, ModuleType] | None:
    """Device type of the accelerator and the module of PyTorch for it; None if there is none, or if nothing has used it
    yet, since any query would initialise it."""
    if not torch.accelerator.is_available() or not (device := torch.accelerator.current_accelerator()):
        return None
    module: ModuleType = torch.get_device_module(device)
    return (device.type, module) if getattr(module, "is_initialized", lambda: False)() else None


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the random states of Python, NumPy and PyTorch afterwards, on the CPU and on all accelerators."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    in_use = accelerator_in_use()
    devices: dict[str, object] = {"devices": ()}
    if in_use:
        devices = {"devices": range(torch.accelerator.device_count()), "device_type": in_use[0]}
    with torch.random.fork_rng(**devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


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
