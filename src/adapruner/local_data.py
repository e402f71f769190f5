"""Data that lies on this machine: the folders named in an environment variable are looked through first."""

from __future__ import annotations

import os
from pathlib import Path

DATA_FOLDERS_VARIABLE = "ADAPRUNER_DATA"


def find_local_data(name: str) -> Path | None:
    """The file or folder of a relative path in the first of the folders of `$ADAPRUNER_DATA` that has it, or of an
    absolute path if it exists."""
    if Path(name).is_absolute():
        return Path(name) if Path(name).exists() else None
    for folder in os.environ.get(DATA_FOLDERS_VARIABLE, "").split(os.pathsep):
        if folder and (path := Path(folder) / name).exists():
            return path
    return None
