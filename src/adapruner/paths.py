"""Paths as a user writes them, and data that lies on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from adapruner.errors import AdaPrunerError, reason


def given_path(name: str | Path) -> Path:
    """The path that is meant, with the home folder for `~`; it need not exist.

    Raises:
        AdaPrunerError: nothing could be there: the name is too long, leads in circles or through an unreadable folder,
            or the home folder is nobody's.
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
    """The path of a new file or folder, which is written beside it first; its parent need not exist.

    Raises:
        AdaPrunerError: nothing can be written there.
    """
    path = given_path(name)
    if path.name in ("", ".."):
        raise AdaPrunerError(f"{str(name)!r} is no name for something new: choose another output")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise AdaPrunerError(f"cannot write to {path}: {existing} is not a writable directory")
    # What a link leads to is replaced, and not the link.
    return path.resolve() if path.is_symlink() else path


def data_folders() -> list[Path]:
    """The folders of `$ADAPRUNER_DATA`, whether or not they exist."""
    return [Path(name) for name in os.environ.get("ADAPRUNER_DATA", "").split(os.pathsep) if name]


def find_local_data(name: str) -> Path | None:
    """The file or folder of a relative path in the first of the folders of `$ADAPRUNER_DATA` that has it, or of an
    absolute path if it exists."""
    places = [Path(name)] if Path(name).is_absolute() else [folder / name for folder in data_folders()]
    return next((place for place in places if place.exists()), None)
