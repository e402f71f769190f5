"""The run folder: where every stage leaves what it made. What exists in it is whole."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError
from adapruner.files import Manifest, write_atomically
from adapruner.measurement import InputMoments, Statistics
from adapruner.planning import PruningPlan
from adapruner.recovery import working_folder

_SECONDS_BETWEEN_LOOKS = 0.2
# Options on which what is computed does not depend, but whether it can be.
_MAY_CHANGE = ("device", "layer_wise")
# Others who probe a lock hold it for a moment: a lock that is taken every time is held.
_PROBES = 3


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run. Files are written beside their place and renamed into it, so that a kill leaves no half ones, and
    named in a manifest, so that what was changed or damaged since is not taken for what it was."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def windows(self) -> Path:
        return self.path / "windows.safetensors"

    @property
    def statistics(self) -> Path:
        return self.path / "statistics.safetensors"

    @property
    def statistics_parts(self) -> Path:
        return self.path / "statistics.parts"

    @property
    def moments(self) -> Path:
        return self.path / "moments"

    @property
    def journal(self) -> Path:
        return self.path / "study.journal"

    @property
    def study(self) -> Path:
        return self.path / "study.json"

    @property
    def locks(self) -> Path:
        return self.path / "locks"

    @property
    def search(self) -> Path:
        return self.path / "search.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def recovered(self) -> Path:
        return self.path / "recovered"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.path)

    def check(self, config: PruneConfig, overwrite: bool) -> None:
        """Refuses, before anything is done, a folder that cannot take this run.

        Raises:
            AdaPrunerError: it holds the run of another config or other files, or cannot be written.
        """
        try:
            if self.config.is_file():
                if not overwrite:
                    self._refuse_other_config(config)
            elif self.path.exists() and not self._is_empty():
                raise AdaPrunerError(f"{self.path} exists and holds no run: choose another output")
            existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK):
                raise AdaPrunerError(f"cannot write to {self.path}: {existing} is no folder that can be written")
        except OSError as error:
            raise AdaPrunerError(f"cannot write to {self.path}: {error.strerror}") from None

    def create(self, config: PruneConfig, overwrite: bool) -> None:
        """Makes the folder, empties it to start again, or leaves what is there to go on.

        Raises:
            AdaPrunerError: it cannot be written.
        """
        if overwrite and self.config.is_file():
            self._clear()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdaPrunerError(f"cannot write to {self.path}: {error.strerror}") from None
        write_atomically(self.config, config.save)

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Makes the folder, and keeps others from running in it while this lasts.

        Raises:
            AdaPrunerError: another process runs in it, or it cannot be written.
        """
        try:
            self.locks.mkdir(parents=True, exist_ok=True)
            # Who asks whether the run is led holds the lock for a moment.
            lock = FileLock(self._leader, timeout=2)
            lock.acquire()
        except Timeout:
            raise AdaPrunerError(
                f"another process is at the run in {self.path}: wait for it, or help it with adapruner join {self.path}"
            ) from None
        except OSError as error:
            raise AdaPrunerError(f"cannot write to {self.path}: {error.strerror}") from None
        try:
            yield
        finally:
            lock.release()
            self._remove_free_locks()

    def is_led(self) -> bool:
        """Whether a process is at the run."""
        for _ in range(_PROBES):
            if _is_free(self._leader):
                return False
            time.sleep(random.uniform(0, _SECONDS_BETWEEN_LOOKS / 10))
        return True

    def wait_for(self, path: Path) -> None:
        """Waits until the process that leads the run has made something.

        Raises:
            AdaPrunerError: it has ended.
        """
        while not path.exists():
            if not self.is_led() and not path.exists():
                raise AdaPrunerError(f"the process that was at the run in {self.path} has ended: start it again")
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _remove_free_locks(self) -> None:
        """Other processes may be about to end."""
        for lock in self.locks.glob("*.lock"):
            with contextlib.suppress(Timeout), FileLock(lock, timeout=0):
                lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.locks.rmdir()

    @property
    def _leader(self) -> Path:
        return self.locks / "leader.lock"

    def discard_damaged(self) -> list[Path]:
        """Removes what was changed or damaged since it was written, for its stage to make it again; of a model, the
        whole folder. What follows from it stays: the stage makes the same again. Results that were removed count as
        damaged; what was only measured on the way is missed where it is needed.

        Returns:
            What is gone.
        """
        models = (self.model, self.recovered)
        missing = {
            path for path in self.manifest.missing() if path in (self.search, self.plan) or path.parent in models
        }
        gone = {
            next((folder for folder in models if folder in path.parents), path) for path in self._damaged() | missing
        }
        if gone & {self.study, self.journal}:
            # One means nothing without the other.
            gone |= {path for path in (self.study, self.journal) if path.is_file()}
        if gone:
            # It is the last, and says what the others do.
            gone |= {self.result} if self.result.is_file() else set()
        for path in gone:
            self._remove(path)
        return sorted(gone)

    def damaged_measurements(self) -> list[Path]:
        """What other runs take over, and was changed or damaged since it was written."""
        taken = {self.windows, self.statistics, self.search}
        return sorted(path for path in self._damaged() if path in taken or path.parent == self.moments)

    def _damaged(self) -> set[Path]:
        return {*self.manifest.damaged(), *filter(_is_unreadable, self._readable_files())}

    def _readable_files(self) -> list[Path]:
        """Those that any process can read without knowing more of them."""
        files = (self.windows, self.statistics, self.study, self.journal, self.search, self.plan, self.evaluation)
        return [path for path in (*files, self.result, *self.moments.glob("*.safetensors")) if path.is_file()]

    def save_statistics(self, statistics: Statistics) -> None:
        """Writes statistics of the whole pool."""
        self.manifest.write(self.statistics, statistics.save)

    def save_part(self, statistics: Statistics, path: Path) -> None:
        """Writes statistics of a part of the pool, which other processes may be writing too."""
        write_atomically(path, statistics.save, f".{uuid.uuid4().hex}")

    def save_moments(self, moments: InputMoments, path: Path) -> None:
        """Writes the second moments of one block."""
        self.manifest.write(path, moments.save)

    def take_over(self, earlier: RunFolder, with_search: bool = True) -> None:
        """Takes what was measured in an earlier run, and found; large moments are linked where the file system can."""
        taken = [self.windows, self.statistics, *([self.search] if with_search else [])]
        for path in taken:
            shutil.copy(earlier.path / path.name, path)
        if earlier.moments.is_dir():
            shutil.copytree(earlier.moments, self.moments, copy_function=_link_or_copy, dirs_exist_ok=True)
        self.manifest.take_over(earlier.manifest, [*taken, *self.moments.glob("*")])

    def save_plan(self, plan: PruningPlan) -> None:
        self.manifest.write(self.plan, plan.save)

    def save_windows(self, windows: dict[str, Tensor]) -> None:
        self.manifest.write(self.windows, lambda partial: save_file(windows, partial))

    def replace_windows(self, windows: dict[str, Tensor]) -> None:
        """Writes other windows; what was measured of those of before goes, and processes that help with them stop."""
        of_others = [self.study, self.journal, self.statistics_parts]
        if len(load_file(self.windows).get("compensation", ())) != len(windows.get("compensation", ())):
            of_others.append(self.moments)
        for path in of_others:
            self._remove(path)
        self.save_windows(windows)

    def save_json(self, content: dict[str, Any], path: Path) -> None:
        self.manifest.write(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n"))

    def name_model(self, folder: Path) -> None:
        """Names the files of a finished model in the manifest, but for its card, which is for people to write on."""
        self.manifest.name(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")

    def save_report(self, page: str) -> None:
        """Writes the report, which another process may be writing too."""
        write_atomically(self.report, lambda partial: partial.write_text(page, "utf-8"), f".{uuid.uuid4().hex}")

    def _is_empty(self) -> bool:
        """A kill before the config was in place leaves its unfinished file, and locks."""
        unfinished = {f"{self.config.name}.partial", self.locks.name}
        return self.path.is_dir() and all(path.name in unfinished for path in self.path.iterdir())

    def _clear(self) -> None:
        files = (self.windows, self.statistics, self.journal, self.study, self.search, self.plan, self.evaluation)
        folders = (self.statistics_parts, self.moments, self.model, self.recovered, working_folder(self.recovered))
        for path in (self.result, *folders, *files, self.report, self.log, self.manifest.path, self.config):
            self._remove(path)

    def _remove(self, path: Path) -> None:
        # Forgotten last: what a kill leaves of a folder is still known to be damaged.
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        self.manifest.forget(path)

    def _refuse_other_config(self, config: PruneConfig) -> None:
        old, new = PruneConfig.load(self.config).model_dump(), config.model_dump()
        changed = [
            f"{name} {old[name]!r} → {new[name]!r}"
            for name in new
            if new[name] != old[name] and name not in _MAY_CHANGE
        ]
        if changed:
            raise AdaPrunerError(
                f"{self.path} holds a run of another config ({', '.join(changed)}): choose another output, or"
                " --overwrite to start it again"
            )


def _is_free(lock: Path) -> bool:
    if not lock.is_file():
        return True
    try:
        with FileLock(lock, timeout=0):
            return True
    except Timeout:
        return False


def _link_or_copy(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _is_unreadable(path: Path) -> bool:
    """Whether a file is not what its name says; a last line of a journal that a kill cut off is mended later."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return False
        lines = path.read_text().splitlines(keepends=True) if path.suffix == ".journal" else [path.read_text()]
        for line in lines:
            if path.suffix != ".journal" or line.endswith("\n"):
                json.loads(line)
    except (OSError, ValueError, SafetensorError):
        return True
    return False
