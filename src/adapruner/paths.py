"""Paths as a user writes them, and local data."""

from __future__ import annotations

import os
from pathlib import Path

from adapruner.errors import AdaPrunerError, reason


def given_path(name: str | Path) -> Path:
    """The path of a name, with the home folder for `~`; it need not exist.

    Raises:
        AdaPrunerError: there can be no such path: the name is too long or no Unicode text, leads through a cycle of
            links or an unreadable folder, or names the home folder of an unknown user.
    """
    try:
        path = Path(name).expanduser()
        str(path).encode()  # libraries read and write names that are text
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        raise AdaPrunerError(f"invalid path {str(name)!r}: {reason(error)}") from None
    return path


def output_path(name: str | Path) -> Path:
    """The path of a new file or folder; its parent need not exist.

    Raises:
        AdaPrunerError: nothing can be written there.
    """
    path = given_path(name)
    if path.name in ("", ".."):
        raise AdaPrunerError(f"{str(name)!r} is not a name for a new file or folder: choose another output")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise AdaPrunerError(f"cannot write to {path}: {existing} is not a writable directory")
    # The target of a link is replaced, not the link.
    return path.resolve() if path.is_symlink() else path


def find_local_data(name: str) -> Path | None:
    """The file or folder of a relative path, in the first folder of `$ADAPRUNER_DATA` that has it, or of an absolute
    path; None if there is none."""
    folders = [folder for folder in os.environ.get("ADAPRUNER_DATA", "").split(os.pathsep) if folder]
    paths = [Path(name)] if Path(name).is_absolute() else [Path(folder, name) for folder in folders]
    return next((path for path in paths if path.exists()), None)
