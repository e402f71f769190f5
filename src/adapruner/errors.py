"""The one exception class whose message is written for the user, and what messages quote of other errors."""


class AdaPrunerError(Exception):
    """Something the user can mend: what is wrong, the numbers, what to do.

    The command line prints the message on one line and exits with code 2; it never shows a traceback for it.
    """


def reason(error: BaseException) -> str:
    """The first line of an error of another library; with its type where the text alone says little."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    speaks_for_itself = isinstance(error, OSError | ValueError) or type(error) in (Exception, RuntimeError)
    return lines[0] if speaks_for_itself else f"{type(error).__name__}: {lines[0]}"
