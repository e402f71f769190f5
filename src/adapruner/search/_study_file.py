"""The file in which the finished trials of a search are kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from adapruner.errors import AdaPrunerError, first_problem, reason


class _Attributes(TypedDict):
    """User attributes of a trial whose budget could not be met; other modules of this package name them."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]  # of pydantic

    batch: Annotated[list[int], Field(min_length=2, max_length=2)]
    start: NotRequired[int]
    fixed_metric: NotRequired[str]


class _AttributesOfJudged(_Attributes):
    """User attributes of a judged trial."""

    losses: list[float]
    stopped: NotRequired[bool]


_ATTRIBUTES: dict[TrialState, TypeAdapter[Any]] = {
    TrialState.PRUNED: TypeAdapter(_Attributes),
    TrialState.COMPLETE: TypeAdapter(_AttributesOfJudged),
}


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """While it lasts, Optuna does not log."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@dataclass(frozen=True)
class StudyFile:
    """Finished trials in a file of the run folder, one JSON line for each, as Optuna's journal storage writes them.

    Attributes:
        path: of the file, which holds the trials of several searches.
        name: of the study in it; a search that depends on anything else needs another name.
    """

    path: Path
    name: str

    def opened(self) -> optuna.Study:
        """The study, to add trials to; created if it does not exist. One process at a time may add trials.

        Raises:
            AdaPrunerError: the file is damaged.
        """
        # A kill leaves Optuna's lock, which it would wait for; a kill or a full disk leaves an incomplete line.
        Path(f"{self.path}.lock").unlink(missing_ok=True)
        if self.path.is_file() and (content := self.path.read_bytes()) and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)
        storage = self._read()
        with quiet_optuna():
            study = optuna.create_study(storage=storage, study_name=self.name, load_if_exists=True)
        self._check(study.get_trials(deepcopy=False))
        return study

    def finished(self) -> list[FrozenTrial]:
        """The trials whose budget could be met, in the order in which they were proposed; none if the search has not
        begun. A process may be adding others.

        Raises:
            AdaPrunerError: the file is damaged.
        """
        if not self.path.is_file():
            return []
        storage = self._read()
        try:
            study = storage.get_study_id_from_name(self.name)
        except KeyError:
            return []
        trials = storage.get_all_trials(study, deepcopy=False)
        self._check(trials)
        return [trial for trial in trials if trial.state == TrialState.COMPLETE]

    def _read(self) -> JournalStorage:
        try:
            # Optuna's default lock is a link, which users of Windows may not create.
            return JournalStorage(JournalFileBackend(str(self.path), JournalFileOpenLock(str(self.path))))
        except OSError:
            raise
        except Exception as error:  # lines that are not JSON, or JSON of something else
            raise self._damaged(reason(error)) from None

    def _check(self, trials: Sequence[FrozenTrial]) -> None:
        """Raises AdaPrunerError if trials have other attributes than those of a search."""
        try:
            for trial in trials:
                _ATTRIBUTES[trial.state].validate_python(trial.user_attrs)
        except KeyError:
            raise self._damaged("a trial in it is not finished") from None
        except ValidationError as error:
            raise self._damaged(first_problem(error)) from None

    def _damaged(self, problem: str) -> AdaPrunerError:
        return AdaPrunerError(f"{self.path} is damaged ({problem}): remove it to repeat the search")
