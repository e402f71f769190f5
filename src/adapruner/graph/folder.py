"""The run folder: its paths, its records, and the lock that keeps other commands out of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from pydantic import ValidationError

from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError, reason
from adapruner.files import link_or_copy, write_atomically, write_text
from adapruner.graph.records import CARD, Record, are_as_written, stamps

# Some network file systems grant a lock to everybody: a running command also touches a file, which others see.
_SECONDS_BETWEEN_BEATS = 5


class RunFolder:
    """A folder with the artifacts of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.log = path / "log.jsonl"
        self.study = path / "study.jsonl"
        self.model = path / "model"
        self.report = path / "report.html"
        self.speed = path / "speed.json"
        # A model and text that were in memory.
        self.given = path / "given"
        self._keys = path / "keys"
        self._lock = path / ".lock"
        self._running = path / ".running"

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

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the folder, and keeps other commands out of it while this lasts.

        Raises:
            AdaPrunerError: another command is running in it, or it cannot be written.
        """
        is_busy = AdaPrunerError(f"another command is running in {self.path}: wait for it, or choose another `output`")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._lock).acquire(timeout=0)
        except Timeout:
            raise is_busy from None
        except (OSError, NotImplementedError) as error:
            raise AdaPrunerError(f"cannot write to {self.path}: {reason(error)}") from None
        with lock:
            if self._is_touched():
                raise is_busy
            with contextlib.suppress(OSError):  # a full disk is reported where it matters
                self._running.write_text(f"{socket.gethostname()} {os.getpid()}", encoding="utf-8")
            ended = threading.Event()
            threading.Thread(target=self._touch_until, args=(ended,), daemon=True).start()
            try:
                yield
            finally:
                ended.set()
                self._running.unlink(missing_ok=True)

    def _touch_until(self, ended: threading.Event) -> None:
        while not ended.wait(_SECONDS_BETWEEN_BEATS):
            with contextlib.suppress(OSError):
                os.utime(self._running)

    def _is_touched(self) -> bool:
        """True if another command, perhaps on another machine, touches the file of a running one; what a killed command
        left is not touched."""
        try:
            host, process = self._running.read_text(encoding="utf-8").split()
            before = self._running.stat().st_mtime_ns
            if host == socket.gethostname() and not psutil.pid_exists(int(process)):
                return False
            time.sleep(3 * _SECONDS_BETWEEN_BEATS)
            return self._running.stat().st_mtime_ns != before
        except (FileNotFoundError, ValueError):
            return False

    def record(self, name: str) -> Record | None:
        """The record of a finished or unfinished artifact; None where none can be read."""
        try:
            return Record.model_validate_json(self._record(name).read_bytes())
        except (OSError, ValidationError):
            return None

    def is_made(self, name: str, key: str) -> bool:
        """True if the artifact is complete, has this key, and is as it was written."""
        record = self.record(name)
        return bool(record and record.key == key and record.files and are_as_written(record.files, self.path))

    def is_damaged(self, name: str, key: str) -> bool:
        """True if some files of a finished artifact with this key are not as they were written; removed ones do not
        count."""
        record = self.record(name)
        if record is None or record.key != key or record.files is None:
            return False
        left = {file: stamp for file, stamp in record.files.items() if (self.path / file).exists()}
        return not are_as_written(left, self.path)

    def begin(self, name: str, record: Record) -> Path:
        """Notes that an artifact is being made; returns the folder to resume from."""
        if self.record(name) != record:
            self._save(name, record)
        work = self.work(name, record.key)
        for other in work.parent.glob(f"{_flat(name)}-*"):
            if other != work:
                shutil.rmtree(other)
        work.mkdir(parents=True, exist_ok=True)
        return work

    def finish(self, name: str, record: Record, beside: Iterable[str] = ()) -> None:
        """Notes that an artifact is whole; removes what it was resumed from.

        Args:
            beside: further files that belong to it.
        """
        path = self.path / name
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        own = [file for file in files if file.name != CARD]
        own += [file for file in map(self.path.joinpath, beside) if file.is_file()]
        self._save(name, record.model_copy(update={"files": stamps(own, self.path)}))
        shutil.rmtree(self.work(name, record.key), ignore_errors=True)

    def remove(self, name: str) -> None:
        """Removes an artifact with its record, and folders in which nothing is left."""
        path, record = self.path / name, self._record(name)
        if path.is_dir():
            shutil.rmtree(path)
        for file in (path, record):
            file.unlink(missing_ok=True)
        for folder in (path.parent, record.parent, self.path):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def remove_files(self, name: str) -> None:
        """Removes the folder of a finished artifact; its record is kept."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def remove_given_but(self, config: PruneConfig) -> None:
        """Removes models and texts of earlier calls that the config does not name."""
        names = str(list(config.model_dump().values()))
        for path in self.given.iterdir() if self.given.is_dir() else ():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def work(self, name: str, key: str) -> Path:
        """The folder of an unfinished artifact; another key has another folder."""
        return self.path / "unfinished" / f"{_flat(name)}-{key[:16]}"

    def take_over(self, name: str, source: RunFolder) -> None:
        """Copies an artifact of another run; large files are linked where the file system can."""
        record = source.record(name)
        assert record is not None
        assert record.files is not None
        self.remove(name)
        for file in record.files:
            target = self.path / file
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(source.path / file, target)
        self._save(name, record)

    def _record(self, name: str) -> Path:
        return self._keys / f"{_flat(name)}.json"

    def _save(self, name: str, record: Record) -> None:
        write_text(self._record(name), record.model_dump_json(indent=2) + "\n")


def _flat(name: str) -> str:
    return name.replace("/", "-")
