"""The database in which the trials of a search are kept, shared by all processes that run them."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import OperationalError
from typing import Any
from urllib.parse import quote

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SAWarning, SQLAlchemyError

from adapruner.errors import AdaPrunerError, reason

# Seconds between two signs of life of a running trial, without one until it counts as lost, and of waiting for a
# database file that another process writes to.
_HEARTBEAT, _GRACE, _LOCK_TIMEOUT = 10, 60, 60
# Processes that start together create the tables together, which all but one are refused.
_ATTEMPTS = 5
_CREATED_BY_ANOTHER = ("already exists", "unique constraint")


def sqlite_url(path: Path) -> str:
    """The URL of a database in one file.

    Raises:
        AdaPrunerError: such a URL cannot name the path.
    """
    if "?" in str(path.absolute()):
        raise AdaPrunerError(f"{path.absolute()} cannot hold a database, because its name contains a question mark")
    return f"sqlite:///{path.absolute()}"


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keeps Optuna from logging what it creates and what fails."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@dataclass(frozen=True)
class StudyPlace:
    """Where the trials of a search are kept.

    Attributes:
        url: SQLAlchemy URL of a database.
        name: of the study in it; a search that depends on anything else needs another name.
    """

    url: str
    name: str

    def check(self) -> None:
        """Opens the database.

        Raises:
            AdaPrunerError: it cannot be opened.
        """
        with self._storage():
            pass

    @property
    def file(self) -> Path | None:
        """The file of an SQLite database."""
        address = self._address
        is_file = address.get_backend_name() == "sqlite" and address.database
        return Path(str(address.database)) if is_file else None

    @contextlib.contextmanager
    def opened(self) -> Iterator[optuna.Study]:
        """Opens the study, or creates it.

        Raises:
            AdaPrunerError: the database cannot be opened, or fails later.
        """
        with self._storage() as storage:
            yield optuna.create_study(storage=storage, study_name=self.name, load_if_exists=True)

    @property
    def _address(self) -> URL:
        try:
            address = make_url(self.url)
        except (SQLAlchemyError, ValueError):
            # What could not be parsed may be a password.
            raise AdaPrunerError("`storage` is not the URL of a database, as postgresql://user@host/name is") from None
        # The default driver differs by the version of SQLAlchemy.
        return address.set(drivername="postgresql+psycopg") if address.drivername == "postgresql" else address

    @contextlib.contextmanager
    def _storage(self) -> Iterator[RDBStorage]:
        try:
            storage = self._open()
            try:
                with quiet_optuna():
                    yield storage
            finally:
                storage.remove_session()
                storage.engine.dispose()
        except Exception as error:
            failure = _of_database(error)
            if failure is None:
                raise
            # Its query may hold a password as well.
            shown = self._address.set(query={}).render_as_string(hide_password=True)
            raise AdaPrunerError(f"the database {shown} failed: {self._without_secrets(reason(failure))}") from None

    def _open(self) -> RDBStorage:
        # Optuna takes braces for a template.
        url = self._address.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        options: dict[str, Any] = {"pool_pre_ping": True}
        if self.file is not None:
            options["connect_args"] = {"timeout": _LOCK_TIMEOUT}
        for attempt in range(_ATTEMPTS):
            try:
                with warnings.catch_warnings(), _logging_left_alone():
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    warnings.simplefilter("error", SAWarning)
                    storage = _Storage(url, options, heartbeat_interval=_HEARTBEAT, grace_period=_GRACE)
                break
            except (StorageInternalError, SQLAlchemyError) as error:
                said = f"{error} {error.__cause__}".lower()
                if not any(sign in said for sign in _CREATED_BY_ANOTHER) or attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(0.2)
            except (ValueError, TypeError, RuntimeError, SAWarning, ImportError) as error:
                hint = (
                    ". For PostgreSQL: pip install '.[postgresql]' in a checkout"
                    if isinstance(error, ImportError)
                    else ""
                )
                said = self._without_secrets(reason(error))
                raise AdaPrunerError(f"`storage` cannot be opened: {said}{hint}") from None
        if self.file is not None:
            storage.engine.dispose()
            event.listen(storage.engine, "connect", _write_ahead)
        return storage

    def _without_secrets(self, text: str) -> str:
        values = [value for values in self._address.normalized_query.values() for value in values]
        for secret in filter(None, (self._address.password, *values)):
            text = text.replace(str(secret), "***").replace(quote(str(secret)), "***")
        return text


@contextlib.contextmanager
def _logging_left_alone() -> Iterator[None]:
    """Where the root logger has no handler, Optuna sets up the logging of the whole process when it creates tables,
    which disables all loggers that there are."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _of_database(error: BaseException | None) -> BaseException | None:
    """What a database has said, which Optuna may have met with errors of its own."""
    while error is not None and not isinstance(error, StorageInternalError | SQLAlchemyError):
        error = error.__context__
    return error and (error.__cause__ or error)


def _write_ahead(connection: Any, _: object) -> None:
    """Spares most of the waiting for the disk: a trial is some thirty transactions. What a power failure takes is the
    last of them; a kill takes nothing. SQLite changes the mode only while nobody else uses the file. Otherwise the
    next connection tries again."""
    connection.execute("PRAGMA busy_timeout=0")
    with contextlib.suppress(OperationalError):
        connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"PRAGMA busy_timeout={1000 * _LOCK_TIMEOUT}")
    ((mode,),) = connection.execute("PRAGMA journal_mode").fetchall()
    if mode == "wal":
        # In another mode, a power failure could then break the file.
        connection.execute("PRAGMA synchronous=NORMAL")


class _Storage(RDBStorage):
    def record_heartbeat(self, trial_id: int) -> None:
        """Nothing is lost with one that fails, and the thread that records them would end with its error."""
        with contextlib.suppress(StorageInternalError):
            super().record_heartbeat(trial_id)
