"""The one exception class whose message is written for the user."""


class AdaPrunerError(Exception):
    """Something the user can mend: what is wrong, the numbers, what to do.

    The command line prints the message on one line and exits with code 2; it never shows a traceback for it.
    """
