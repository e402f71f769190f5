"""A folder of artifacts: their records, and the lock that keeps other commands out of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from adapruner.base.errors import AdaPrunerError, reason
from adapruner.base.files import link_or_copy, write_text
from adapruner.graph.nodes import Record

# Some network file systems grant a lock to everybody: a running command also touches a file, which others see.
_SECONDS_BETWEEN_BEATS = 5
# Larger files are told apart by their size and, where they have one, their header.
_HASHED_WHOLE = 1 << 22


class Folder:
    """A folder with artifacts.

    Args:
        state: the folder of records, of unfinished work and of the lock; by default the same.
        editable: names of files that people or other commands change too: that one has changed is no damage.

    Attributes:
        noun: what it holds, for messages.
        shown: the path in messages.
    """

    noun = "artifacts"

    def __init__(self, path: Path, state: Path | None = None, editable: Collection[str] = ()) -> None:
        self.path = self.shown = path
        self._editable = editable
        state = state or path
        self._keys, self.unfinished = state / "keys", state / "unfinished"
        self._lock, self._running = state / ".lock", state / ".running"

    def place(self, name: str) -> Path:
        """The path of an artifact."""
        return self.path / name

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the folder, and keeps other commands out of it while this lasts."""
        is_busy = AdaPrunerError(f"another command is running in {self.shown}: wait for it, or choose another `output`")
        try:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._lock).acquire(timeout=0)
        except Timeout:
            raise is_busy from None
        except (OSError, NotImplementedError) as error:
            raise AdaPrunerError(f"cannot write to {self.shown}: {reason(error)}") from None
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
        """True if the artifact, which may be an empty folder, is complete, has this key, and is as it was written."""
        record = self.record(name)
        return bool(record and record.key == key and record.files is not None and self._are_as_written(record.files))

    def is_damaged(self, name: str, key: str) -> bool:
        """True if some files of a finished artifact with this key are not as they were written; removed ones do not
        count."""
        record = self.record(name)
        if record is None or record.key != key or record.files is None:
            return False
        left = {file: stamp for file, stamp in record.files.items() if (self.path / file).exists()}
        return not self._are_as_written(left)

    def begin(self, name: str, record: Record) -> Path:
        """Notes that an artifact is being made; returns the folder to resume from."""
        then = self.record(name)
        if then is None or then.files is None:  # a finished one counts until another takes its place
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
        path = self.place(name)
        inside = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        files = [file for file in inside if file == path or file.name not in self._editable]
        files += [file for file in map(self.path.joinpath, beside) if file.is_file()]
        stamps = {file.relative_to(self.path).as_posix(): self._stamp(file) for file in sorted(files)}
        self._save(name, record.model_copy(update={"files": stamps}))
        shutil.rmtree(self.work(name, record.key), ignore_errors=True)

    def remove(self, name: str) -> None:
        """Removes an artifact with its record, and folders in which nothing is left."""
        path, record = self.place(name), self._record(name)
        if path.is_dir():
            shutil.rmtree(path)
        for file in (path, record):
            file.unlink(missing_ok=True)
        for folder in (path.parent, record.parent, self.path):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def work(self, name: str, key: str) -> Path:
        """The folder of an unfinished artifact; another key has another folder."""
        return self.unfinished / f"{_flat(name)}-{key[:16]}"

    def take_over(self, name: str, source: Folder) -> None:
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

    def _are_as_written(self, files: Mapping[str, str]) -> bool:
        """True if all files exist and are as they were written."""
        try:
            return all(self._stamp(self.path / name) == stamp for name, stamp in files.items())
        except (OSError, SafetensorError):
            return False

    def _stamp(self, path: Path) -> str:
        """The SHA-256 of a small file; the size of a large one, and the SHA-256 of the header if it is a safetensors
        file, whose header says where every tensor ends: reading a model of 14 GB at every call would take minutes. Of
        an editable file, only that it is there."""
        size = path.stat().st_size
        if path.name in self._editable:
            return "any"
        if size <= _HASHED_WHOLE:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix != ".safetensors":
            return f"{size} bytes"
        with safe_open(path, "pt"), path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        return f"{size} bytes, {hashlib.sha256(header).hexdigest()}"

    def _record(self, name: str) -> Path:
        return self._keys / f"{_flat(name)}.json"

    def _save(self, name: str, record: Record) -> None:
        write_text(self._record(name), record.model_dump_json(indent=2) + "\n")


def _flat(name: str) -> str:
    return name.replace("/", "-")
