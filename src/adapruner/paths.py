"""Paths as a user writes them."""

from __future__ import annotations

import os
from pathlib import Path

from adapruner.errors import AdaPrunerError, reason


def given_path(name: str | Path) -> Path:
    """The path that is meant, with the home folder for `~`; it need not exist.

    Raises:
        AdaPrunerError: nothing could be there: the name is too long, goes in circles or through a folder that cannot be
            read, or the home folder is nobody's.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        raise AdaPrunerError(f"there can be nothing at {str(name)!r}: {reason(error)}") from None
    return path


def output_path(name: str | Path) -> Path:
    """The same for what is to be written, with what is beside it while it is not whole; its folder need not exist.

    Raises:
        AdaPrunerError: nothing can be written there.
    """
    path = given_path(name)
    if path.name in ("", ".."):
        raise AdaPrunerError(f"{str(name)!r} is no name for something new: choose another output")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise AdaPrunerError(f"cannot write to {path}: {existing} is not a writable directory")
    return path
