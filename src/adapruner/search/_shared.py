"""An Optuna study that several processes work on, any of which may be killed at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from adapruner.errors import AdaPrunerError, reason
from adapruner.files import write_atomically

_WORKER = "worker"


@dataclass(frozen=True)
class StudyPlace:
    """Where the trials of a search are kept.

    Attributes:
        folder: shared by all processes; holds the journal and the locks by which they know of each other.
        database: URL of an SQL database that holds the trials in place of the journal.
    """

    folder: Path
    database: str | None = None

    @property
    def journal(self) -> Path:
        return self.folder.absolute() / "study.journal"

    @property
    def locks(self) -> Path:
        """A folder for the locks, which means nothing once no process works here."""
        return self.folder.absolute() / "locks"

    @property
    def record(self) -> Path:
        """Says where the trials are, and under what name."""
        return self.folder / "study.json"

    def check(self, overwrite: bool = False) -> None:
        """Refuses, before any long work, a place that will not do.

        Args:
            overwrite: what is there will go.

        Raises:
            AdaPrunerError: the database cannot be reached, or the trials of before are elsewhere.
        """
        if self.database is not None:
            with _open_database(self.database):
                pass
        if not overwrite and self.record.is_file():
            self._read_name()

    @property
    def described(self) -> str:
        """What the record says of it, without a password."""
        return make_url(self.database).render_as_string(hide_password=True) if self.database else "its journal"

    @property
    def name(self) -> str:
        """The name of the study, its own among those of a database; made where there is none.

        Raises:
            AdaPrunerError: the trials are elsewhere.
        """
        self.register()
        return self._read_name()

    def register(self) -> None:
        """Gives the study a name, and says where it is."""
        self.locks.mkdir(parents=True, exist_ok=True)
        with FileLock(self.locks / "asking.lock"):
            if not self.record.is_file():
                record = json.dumps({"place": self.described, "name": f"adapruner-{uuid.uuid4().hex}"})
                write_atomically(self.record, lambda partial: partial.write_text(record))

    def check_name(self, name: str) -> None:
        """Makes sure that the run is still the one that had this name.

        Raises:
            AdaPrunerError: it was started again.
        """
        if not self.record.is_file() or self._read_name() != name:
            raise AdaPrunerError(f"the run in {self.folder} was started again meanwhile: help it from the beginning")

    def _read_name(self) -> str:
        try:
            record = json.loads(self.record.read_text())
            place, name = record["place"], str(record["name"])
        except (ValueError, LookupError, TypeError) as error:
            raise AdaPrunerError(
                f"{self.record} is damaged ({reason(error)}): give the command of the run again"
            ) from None
        if place != self.described:
            raise AdaPrunerError(
                f"the trials of {self.folder} are in {place} and not in {self.described}: name the same --storage"
            )
        return name

    @contextlib.contextmanager
    def opened(self) -> Iterator[optuna.Study]:
        """Opens the study, or makes it.

        Raises:
            AdaPrunerError: the database cannot be reached.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with _open_database(self.database) if self.database else self._open_journal() as storage:
            yield optuna.create_study(storage=storage, study_name=self.name, load_if_exists=True)

    @contextlib.contextmanager
    def _open_journal(self) -> Iterator[BaseStorage]:
        self.locks.mkdir(parents=True, exist_ok=True)
        lock: Any = _JournalLock(self.journal, self.locks / "journal.lock")
        yield JournalStorage(JournalFileBackend(str(self.journal), lock))

    @contextlib.contextmanager
    def working(self) -> Iterator[Worker]:
        """Takes part in the search until it ends, or the process does."""
        self.locks.mkdir(parents=True, exist_ok=True)
        worker = Worker(self.locks, f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        with FileLock(worker.lock(worker.name)):
            try:
                yield worker
            finally:
                worker.lock(worker.name).unlink(missing_ok=True)


@contextlib.contextmanager
def _open_database(url: str) -> Iterator[BaseStorage]:
    try:
        address = make_url(url)
        if address.drivername == "postgresql":  # whose driver differs by the version of SQLAlchemy
            address = address.set(drivername="postgresql+psycopg")
        storage = RDBStorage(address.render_as_string(hide_password=False))
    except ImportError as error:
        raise AdaPrunerError(f"--storage: {error}. For PostgreSQL: pip install 'adapruner[postgresql]'") from None
    except (StorageInternalError, SQLAlchemyError, ValueError, RuntimeError) as error:
        cause: BaseException = error.__cause__ or error
        raise AdaPrunerError(f"--storage cannot be opened: {reason(cause)}") from None
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


@dataclass(frozen=True)
class Worker:
    """A process that works on a study, known to the others by a lock that the system takes from it when it dies."""

    locks: Path
    name: str

    def lock(self, name: str) -> Path:
        """The file that a worker has locked as long as it lives."""
        return self.locks / f"{name}.lock"

    def asking(self) -> FileLock:
        """Held while a trial is chosen, which depends on what the others are at."""
        return FileLock(self.lock("asking"))

    def claim(self, trial: optuna.Trial) -> None:
        """Says whose trial it is."""
        trial.set_user_attr(_WORKER, self.name)

    def drop_abandoned(self, study: optuna.Study) -> None:
        """Marks the trials of workers that have died as failed."""
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self._lives(trial.user_attrs.get(_WORKER)):
                # It may have finished it just before it ended.
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _lives(self, name: str | None) -> bool:
        if name == self.name:
            return True
        if name is None or not self.lock(name).is_file():
            return False
        try:
            with FileLock(self.lock(name), timeout=0):
                self.lock(name).unlink(missing_ok=True)
        except Timeout:
            return True
        return False


class _JournalLock:
    """Lets one process at a time write to a journal, after it has removed what a kill cut off of the last line."""

    def __init__(self, journal: Path, lock: Path) -> None:
        self._journal, self._lock = journal, FileLock(lock)

    def acquire(self) -> bool:
        self._lock.acquire()
        if not self._journal.is_file():
            raise AdaPrunerError(f"{self._journal} is gone: the run was started again meanwhile")
        with self._journal.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._lock.release()
