"""The one exception class whose message is written for the user, and what messages say of other errors."""

from __future__ import annotations

import errno

# The text of these is a name, or part of a sentence of the interpreter's.
_SAY_LITTLE = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RecursionError)
_LONGEST_REASON = 300


class AdaPrunerError(Exception):
    """Something the user can mend: what is wrong, the numbers, what to do.

    The command line prints the message on one line and exits with code 2; it never shows a traceback for it.
    """


class NonFiniteError(AdaPrunerError):
    """Some numbers became infinite or no numbers: broken weights, a dtype that is too narrow, or a bad sample."""


def describe_failure(error: BaseException, takes_less: str) -> str | None:
    """What went wrong, and what helps, where the machine has given out and not the program: memory, disk, permissions;
    None for anything else.

    Args:
        takes_less: what takes less memory.
    """
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_about_memory(str(error))):
        return f"out of memory: {takes_less}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk{_of(error)}: free some"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{(error.strerror or 'the system refuses').lower()}{_of(error)}"
    return None


def _is_about_memory(message: str) -> bool:
    """PyTorch has no exception of its own for the memory of the CPU; the last one is what oneDNN says of it."""
    signs = ("out of memory", "can't allocate memory", "bad_alloc", "could not create a primitive")
    return any(sign in message.lower() for sign in signs)


def _of(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


def reason(error: BaseException) -> str:
    """What an error of another library says, on one line that is not too long; with its type where that says little."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is no UTF-8 text, as byte {error.start} shows"
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_REASON:
        text = f"{text[:_LONGEST_REASON]} …"
    if not text:
        return type(error).__name__
    return f"{type(error).__name__}: {text}" if isinstance(error, _SAY_LITTLE) else text
