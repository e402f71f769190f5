"""Handling of Ctrl-C (SIGINT), of requests to terminate (SIGTERM), and of a terminal that was closed (SIGHUP)."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

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
