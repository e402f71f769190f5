"""The folder of a run: its files, and its options."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path

from adapruner.base.errors import AdaPrunerError, reason
from adapruner.base.files import write_atomically
from adapruner.graph.folder import Folder
from adapruner.options import PruneConfig

# The model card is for people to edit; the report is written again by its own command.
_EDITABLE = ("README.md", "report.html")


class RunFolder(Folder):
    """A folder with the artifacts of a run."""

    noun = "a run"

    def __init__(self, path: Path) -> None:
        super().__init__(path, editable=_EDITABLE)
        self.config = path / "config.yaml"
        self.log = path / "log.jsonl"
        self.study = path / "study.jsonl"
        self.model = path / "model"
        self.report = path / "report.html"
        self.speed = path / "speed.json"
        # A model and text that were in memory.
        self.given = path / "given"

    @classmethod
    def temporary(cls) -> RunFolder:
        """A folder that is removed with the object."""
        run = cls(Path(tempfile.mkdtemp(prefix="adapruner-")))
        weakref.finalize(run, shutil.rmtree, run.path, ignore_errors=True)
        return run

    def read_config(self) -> PruneConfig:
        """The options of the run.

        Raises:
            AdaPrunerError: the folder holds no run.
        """
        if not self.config.is_file():
            raise AdaPrunerError(f"{self.path} holds no run: name the folder that adapruner prune wrote")
        return PruneConfig.load(self.config)

    def save_config(self, config: PruneConfig) -> None:
        write_atomically(self.config, config.save)

    def check_usable(self) -> None:
        """Refuses a folder that holds something else, or cannot be written.

        Raises:
            AdaPrunerError: with what is wrong.
        """
        # A command that was killed at its start leaves these, and perhaps an unfinished config.
        left = (self._lock.name, self._running.name, self.given.name, f"{self.config.name}.partial")
        try:
            if self.path.exists() and not (
                self.path.is_dir() and (self.config.is_file() or all(path.name in left for path in self.path.iterdir()))
            ):
                raise AdaPrunerError(f"{self.path} exists and holds no run: choose another `output`")
            existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        except OSError as error:
            raise AdaPrunerError(f"cannot write to {self.path}: {reason(error)}") from None
        if self.config.is_file():
            self.read_config()
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise AdaPrunerError(f"cannot write to {self.path}: {existing} is not a writable directory")

    def remove_given_but(self, config: PruneConfig) -> None:
        """Removes models and texts of earlier calls that the config does not name."""
        names = str(list(config.model_dump().values()))
        for path in self.given.iterdir() if self.given.is_dir() else ():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
