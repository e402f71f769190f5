"""Ctrl-C, and requests of the system to end (SIGTERM), at a good moment."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


@contextlib.contextmanager
def deferring_interrupts(notice: str) -> Iterator[Callable[[], None]]:
    """Lets Ctrl-C, and a request of the system to end, wait for a good moment; a second one is not waited with.

    Outside of the main thread, which alone hears of them, nothing changes.

    Args:
        notice: what to tell on stderr when one comes.

    Yields:
        A function for good moments, which raises `KeyboardInterrupt` if one came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        if heard:
            raise KeyboardInterrupt(number)
        heard.append(number)
        sys.stderr.write(f"\n{notice}\n")

    def raise_if_heard() -> None:
        if heard:
            raise KeyboardInterrupt(heard[0])

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield raise_if_heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_by_interrupt(number: int, frame: Any) -> NoReturn:
    """A handler of signals that lets a process clean up before it ends."""
    raise KeyboardInterrupt(number)
