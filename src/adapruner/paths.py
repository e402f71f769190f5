"""Paths as a user writes them."""

from __future__ import annotations

from pathlib import Path

from adapruner.errors import AdaPrunerError, reason


def given_path(name: str | Path) -> Path:
    """The path that is meant, with the home folder for `~`; it need not exist.

    Raises:
        AdaPrunerError: no file could be there: the name is too long, goes in circles or through a folder that cannot be
            read, or the home folder is nobody's.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise AdaPrunerError(f"there can be nothing at {str(name)!r}: {reason(error)}") from None
    return path
