"""The exception whose message is written for the user, descriptions of other errors, and interrupts."""

from __future__ import annotations

import difflib
import errno
import os
import re
import reprlib
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

# Errors whose messages are a name, or incomprehensible without the type.
_SAY_LITTLE = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RecursionError)
# Signs in the plain RuntimeError that PyTorch raises if the memory of the CPU is exhausted; the last is from oneDNN.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "could not create a primitive")
# Of the one that it raises if it cannot write all of a checkpoint of a training.
_NOT_WRITTEN = ("iostream error", "unexpected pos")
# Signs in errors of gloo and NCCL if another process of the run has ended.
_PROCESS_ENDED = ("closed by peer", "reset by peer", "remote process exited")
# Users and passwords in URLs, tokens of the Hub, and tokens among the arguments of URLs.
_SECRETS = re.compile(r"(?<=://)[^\s/@]+(?=@)|(?<=\bhf_)[A-Za-z0-9]{30,}|(?<=token=)[^&\s\"'\\]+")
_LONGEST_REASON = 300
# These end a process, or a generator. All others are failures, also panics of Rust libraries, which are no `Exception`.
ENDINGS = (KeyboardInterrupt, SystemExit, GeneratorExit)
_LONGEST_VALUE = 60
_MOST_ERRORS = 8
# Errors of pydantic, by the beginning of their type, in words that continue "`field` value".
_WORDS = {
    "bool": "is neither true nor false",
    "finite_number": "is not a finite number",
    "float": "is not a number",
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be more than {gt:g}",
    "int": "is not a whole number",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be less than {lt:g}",
    "literal_error": "is not one of {expected}",
    "model": "is not a mapping of options to values",
    "string": "is not text",
    "tuple": "is not a list",
}


class AdaPrunerError(Exception):
    """An error that the user can fix. Its message names the problem, the numbers and a remedy; options are named as
    fields in backticks.

    The command line prints the message on one line and exits with code 2, without a traceback.
    """


class NonFiniteError(AdaPrunerError):
    """Numbers became infinite or NaN: broken weights, a dtype that is too narrow, or a bad sample."""


def describe_failure(error: BaseException, takes_less: str) -> str | None:
    """The missing resource and a remedy, if memory, disk space, a permission or another process of the run is missing;
    else None.

    Args:
        takes_less: a way to need less memory.
    """
    number, path = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(sign in text for sign in _OUT_OF_MEMORY):
        return f"out of memory: {takes_less}"
    if any(sign in text for sign in _PROCESS_ENDED):
        return "another process of the run has ended"
    if number in (errno.ENOSPC, errno.EDQUOT) or any(sign in text for sign in _NOT_WRITTEN):
        return f"no space left on the disk{f' ({path})' if path else ''}: free some"
    if path and number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{os.strerror(number).lower()} ({path})"
    return None


def without_secrets(text: str) -> str:
    """A text with an ellipsis in place of passwords and tokens."""
    return _SECRETS.sub("…", text)


def reason(error: BaseException) -> str:
    """The message of another library's error on one line of bounded length; with its type if it says little."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text: byte {error.start} is invalid"
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_REASON:
        text = f"{text[:_LONGEST_REASON]} …"
    if not text:
        return type(error).__name__
    return f"{type(error).__name__}: {text}" if isinstance(error, _SAY_LITTLE) else text


def first_problem(error: ValidationError) -> str:
    """The first invalid field in the content of a file, and its problem; others often follow from it."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]


def describe_invalid(error: ValidationError, known: Collection[str] = ()) -> str:
    """All errors in some options, on one line of bounded length; fields are in backticks.

    Args:
        known: names of fields, to suggest one if a field is unknown.
    """
    errors = error.errors(include_url=False)
    more = [f"and {len(errors) - _MOST_ERRORS} more"] if len(errors) > _MOST_ERRORS else []
    return "; ".join([*(_describe(details, known) for details in errors[:_MOST_ERRORS]), *more])


def _describe(error: ErrorDetails, known: Collection[str]) -> str:
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "conflict":
        return message
    name = ".".join(field for field in error["loc"] if isinstance(field, str))
    field = f"`{_brief(name)}`"
    if kind == "missing":
        return f"{field} is missing"
    if kind == "extra_forbidden":
        return f"{field} is not an option{_suggest(name, known, '`')}"
    value, context = _brief(error["input"]), error.get("ctx", {})
    choices = re.findall("'([^']*)'", context.get("expected", ""))
    context = context | {"expected": ", ".join(choices)}
    words = next((words.format(**context) for start, words in _WORDS.items() if kind.startswith(start)), message)
    return f"{field} {value} {words}" + _suggest(value, choices, "'")


def _suggest(text: str, known: Collection[str], mark: str) -> str:
    close = difflib.get_close_matches(text, known, n=1)
    return f": did you mean {mark}{close[0]}{mark}?" if close else ""


class _Brief(reprlib.Repr):
    """Shows the beginning of long or nested values; Python refuses to print numbers of thousands of digits."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() <= 64 else f"{hex(x)[:20]}…"


def _brief(value: object) -> str:
    """Strings are shown as they are, if they are short."""
    return value if isinstance(value, str) and 0 < len(value) <= _LONGEST_VALUE else _Brief().repr(value)


_INTERRUPTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def handling_interrupts(handler: Callable[[int, object], None]) -> Iterator[None]:
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

    def hear(number: int, frame: object) -> None:
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


def end_by_interrupt(number: int, frame: object) -> NoReturn:
    """A handler of signals that lets a process clean up before it ends."""
    raise KeyboardInterrupt(number)
