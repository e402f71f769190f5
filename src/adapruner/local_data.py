"""Data that lies on this machine: the folders named in an environment variable are looked through first."""

from __future__ import annotations

import os
from pathlib import Path

DATA_FOLDERS_VARIABLE = "ADAPRUNER_DATA"


def find_local_data(relative: str) -> Path | None:
    """The file or folder of that relative path in the first of the folders of `$ADAPRUNER_DATA` that has it."""
    for folder in os.environ.get(DATA_FOLDERS_VARIABLE, "").split(os.pathsep):
        if folder and (path := Path(folder) / relative).exists():
            return path
    return None
