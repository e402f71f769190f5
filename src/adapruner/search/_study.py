"""The search itself: an Optuna study in a journal file, which goes on where it was killed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from adapruner.search._space import FIXED_METRIC, Candidate, SearchSpace


@dataclass(frozen=True)
class Found:
    """A candidate of a finished search and its loss on the objective windows."""

    candidate: Candidate
    loss: float
    trial: int


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        best: the best of all candidates.
        best_fixed: the best of LLM-Pruner's metrics on the first random draw of samples, and its name.
    """

    best: Found
    best_fixed: Found
    best_fixed_name: str


def search(
    space: SearchSpace,
    objective: Callable[[Candidate], float],
    trials: int,
    seed: int,
    journal: Path,
    sampler: Literal["tpe", "random"] = "tpe",
    progress: Callable[[float], None] | None = None,
) -> SearchResult:
    """Runs trials until the journal holds `trials` finished ones.

    What is proposed depends on the seed and on the finished trials alone, so that a search that was killed and
    continued proposes what an undisturbed one would have.

    Args:
        journal: file that records every trial (Optuna's journal storage); made if it is not there.
        progress: called after every finished trial, also for those already in the journal, with the best loss so far.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=_open_journal(journal), study_name="adapruner", load_if_exists=True)
    for interrupted in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(interrupted.number, state=TrialState.FAIL)
    starting_points = space.starting_points()
    already_finished = len(_finished(study))
    for number in range(trials):
        if number >= already_finished:
            study.sampler = _sampler(sampler, random.Random(f"{seed}/{number}").getrandbits(32))
            start = starting_points[number] if number < len(starting_points) else None
            if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                study.enqueue_trial(
                    start.parameters if start else {}, user_attrs=start.attributes if start else space.given()
                )
            trial = study.ask()
            study.tell(trial, objective(space.suggest(trial)))
        if progress:
            progress(min(map(_loss, _finished(study)[: number + 1])))
    return _result(study, space, trials)


def _open_journal(journal: Path) -> JournalStorage:
    """Opens the journal of a search that may have been killed while it wrote."""
    # Optuna's lock is a link to the journal, which must be absolute to be found; a kill leaves it behind.
    journal = journal.absolute()
    for lock in journal.parent.glob(f"{journal.name}.lock*"):
        lock.unlink(missing_ok=True)
    if journal.is_file():
        content = journal.read_bytes()
        whole_lines = content.rfind(b"\n") + 1
        if whole_lines < len(content):
            with journal.open("rb+") as file:
                file.truncate(whole_lines)
    return JournalStorage(JournalFileBackend(str(journal)))


def _sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # Optuna calls these options experimental; without `group`, trials that are given a part would switch
        # `multivariate` off.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _result(study: optuna.Study, space: SearchSpace, trials: int) -> SearchResult:
    finished = _finished(study)[:trials]
    best_fixed = min((trial for trial in finished if FIXED_METRIC in trial.user_attrs), key=_loss)
    return SearchResult(
        best=_found(min(finished, key=_loss), space),
        best_fixed=_found(best_fixed, space),
        best_fixed_name=best_fixed.user_attrs[FIXED_METRIC],
    )


def _found(trial: FrozenTrial, space: SearchSpace) -> Found:
    return Found(space.suggest(trial), _loss(trial), trial.number)


def _loss(trial: FrozenTrial) -> float:
    return float(trial.values[0])
