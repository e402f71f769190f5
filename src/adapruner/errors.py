"""The one exception class whose message is written for the user, and how other errors are described."""

from __future__ import annotations

import errno
import os

# The messages of these are a name, or incomprehensible without the type.
_SAY_LITTLE = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RecursionError)
_LONGEST_REASON = 300


class AdaPrunerError(Exception):
    """An error that the user can fix. Its message says what is wrong, the numbers, and what to do; options are named
    as fields in backticks.

    The command line prints the message on one line and exits with code 2, without a traceback.
    """


class NonFiniteError(AdaPrunerError):
    """Numbers became infinite or NaN: broken weights, a dtype that is too narrow, or a bad sample."""


def describe_failure(error: BaseException, takes_less: str) -> str | None:
    """What is missing and what helps, if the machine lacks memory, disk space or a permission; None for other errors.

    Args:
        takes_less: what needs less memory.
    """
    number, path = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    said = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _is_about_memory(said):
        return f"out of memory: {takes_less}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk{f' ({path})' if path else ''}: free some"
    if path and number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{os.strerror(number).lower()} ({path})"
    return None


def _is_about_memory(message: str) -> bool:
    """PyTorch raises a plain RuntimeError if the memory of the CPU is exhausted; the last sign is from oneDNN."""
    signs = ("out of memory", "can't allocate memory", "bad_alloc", "could not create a primitive")
    return any(sign in message.lower() for sign in signs)


def reason(error: BaseException) -> str:
    """The message of an error of another library on one line of bounded length; with its type if it says little."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text: byte {error.start} is invalid"
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_REASON:
        text = f"{text[:_LONGEST_REASON]} …"
    if not text:
        return type(error).__name__
    return f"{type(error).__name__}: {text}" if isinstance(error, _SAY_LITTLE) else text
