"""The search itself: an Optuna study in a journal file, which goes on where it was killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from adapruner.search._space import Candidate, SearchSpace

FIXED_METRIC = "fixed_metric"


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
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))), study_name="adapruner", load_if_exists=True
    )
    for interrupted in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(interrupted.number, state=TrialState.FAIL)
    starting_points = space.starting_points(seed)
    finished = len(_finished(study))
    for number in range(trials):
        if number >= finished:
            study.sampler = _sampler(space, seed, number, sampler)
            if number < len(starting_points) and not study.get_trials(states=(TrialState.WAITING,)):
                study.enqueue_trial(
                    starting_points[number].parameters, user_attrs={FIXED_METRIC: starting_points[number].name}
                )
            trial = study.ask()
            study.tell(trial, objective(space.suggest(trial)))
        if progress:
            progress(min(map(_loss, _finished(study)[: number + 1])))
    return _result(study, space, trials)


def _sampler(space: SearchSpace, seed: int, number: int, kind: str) -> optuna.samplers.BaseSampler:
    own_seed = random.Random(f"{seed}/{number}").getrandbits(32)
    base: optuna.samplers.BaseSampler = (
        optuna.samplers.TPESampler(seed=own_seed) if kind == "tpe" else optuna.samplers.RandomSampler(seed=own_seed)
    )
    fixed = space.fixed_parameters(seed)
    return optuna.samplers.PartialFixedSampler(fixed, base) if fixed else base


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _result(study: optuna.Study, space: SearchSpace, trials: int) -> SearchResult:
    finished = _finished(study)[:trials]
    fixed = [trial for trial in finished if FIXED_METRIC in trial.user_attrs]
    best_fixed = min(fixed, key=_loss)
    return SearchResult(
        best=_found(min(finished, key=_loss), space),
        best_fixed=_found(best_fixed, space),
        best_fixed_name=best_fixed.user_attrs[FIXED_METRIC],
    )


def _found(trial: FrozenTrial, space: SearchSpace) -> Found:
    candidate = space.suggest(optuna.trial.FixedTrial(trial.params))  # type: ignore[arg-type]
    return Found(candidate, _loss(trial), trial.number)


def _loss(trial: FrozenTrial) -> float:
    return float(trial.values[0])
