"""The processes that a launcher started together, and the signals that end one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch.distributed as distributed


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


_INTERRUPTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def handling_interrupts(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Installs a handler of the interrupts that are not ignored, as `nohup` ignores some, and restores the earlier
    ones; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in _INTERRUPTS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, earlier_handler in before.items():
            signal.signal(number, earlier_handler)


@contextlib.contextmanager
def deferring_interrupts(notice: str) -> Iterator[Callable[[], None]]:
    """Defers interrupts in the main thread until a good moment; a second signal ends the process at once.

    Args:
        notice: printed on stderr when a signal comes.

    Yields:
        A function to call at good moments; it raises `KeyboardInterrupt` if a signal came.
    """
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        if heard:
            raise KeyboardInterrupt(number)
        heard.append(number)
        with contextlib.suppress(OSError):  # the terminal is closed
            sys.stderr.write(f"\n{notice}\n")

    def raise_if_heard() -> None:
        if heard:
            raise KeyboardInterrupt(heard[0])

    with handling_interrupts(hear):
        yield raise_if_heard


def end_by_interrupt(number: int, frame: Any) -> NoReturn:
    """A handler of signals that lets a process clean up before it ends."""
    raise KeyboardInterrupt(number)
