"""The one exception class whose message is written for the user, and what messages quote of other errors."""


class AdaPrunerError(Exception):
    """Something the user can mend: what is wrong, the numbers, what to do.

    The command line prints the message on one line and exits with code 2; it never shows a traceback for it.
    """


# The text of these is a name, or part of a sentence of the interpreter's.
_SAY_LITTLE = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RecursionError)
_LONGEST_REASON = 300


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
