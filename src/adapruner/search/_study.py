"""The search itself: an Optuna study in a journal file, which goes on where it was killed."""

from __future__ import annotations

import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from adapruner.errors import AdaPrunerError
from adapruner.search._space import FIXED_METRIC, Candidate, SearchSpace

Judge = Callable[[Candidate], Iterable[Tensor]]

# A trial is stopped once it has been worse than the best one on so many windows, by so many standard errors of the mean
# difference (see docs/benchmarks.md). It may be as good, but there will be others, and it counts with what it is likely
# to be.
_FEWEST_WINDOWS, _STANDARD_ERRORS = 8, 1.0
_STOPPED = "stopped"


@dataclass(frozen=True)
class Found:
    """A candidate of a finished search, and its loss on the windows on which it was last judged."""

    candidate: Candidate
    loss: float
    trial: int


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        best: the best of the candidates that were not stopped; where finalists were judged further, the best of those.
        best_fixed: the best of LLM-Pruner's metrics on the first random draw of samples, and its name.
        stopped: how many trials were stopped early.
    """

    best: Found
    best_fixed: Found
    best_fixed_name: str
    stopped: int


def search(
    space: SearchSpace,
    judge: Judge,
    trials: int,
    seed: int,
    journal: Path,
    sampler: Literal["tpe", "random"] = "tpe",
    progress: Callable[[float], None] | None = None,
    judge_further: Judge | None = None,
    finalists: int = 3,
) -> SearchResult:
    """Runs trials until the journal holds `trials` finished ones, then judges the best few on further windows.

    What is proposed depends on the seed and on the finished trials alone, so that a search that was killed and
    continued proposes what an undisturbed one would have.

    Args:
        judge: gives the losses of a candidate on held-out windows, batch by batch, the same windows for each. It is not
            asked for more once the candidate is clearly worse than the best one so far, window by window.
        journal: file that records every trial (Optuna's journal storage); made if it is not there.
        progress: called after every finished trial, also for those already in the journal, with the best loss so far.
        judge_further: the same on further windows. The best of many trials owes part of its loss to the windows it was
            chosen on; None takes it as it is.
        finalists: how many are judged further.
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
            study.tell(
                trial, _judged(trial, space.suggest(trial), judge, may_stop=FIXED_METRIC not in trial.user_attrs)
            )
        if progress:
            progress(min(map(_loss, _finished(study)[: number + 1])))
    return _result(study, space, trials, judge_further, finalists)


def _judged(trial: optuna.Trial, candidate: Candidate, judge: Judge, may_stop: bool) -> float:
    """The mean loss of a candidate over all windows, or what it is likely to be where it was stopped; infinite where
    its budget cannot be met or the model is broken.

    Windows differ far more than candidates do, which is why candidates are compared window by window.
    """
    best = min(
        (finished for finished in _finished(trial.study) if math.isfinite(_loss(finished))), key=_loss, default=None
    )
    losses: list[float] = []
    try:
        for batch in judge(candidate):
            for loss in batch.tolist():
                if not math.isfinite(loss):
                    return math.inf
                trial.report(loss, len(losses))
                losses.append(loss)
            if best and may_stop and len(losses) >= _FEWEST_WINDOWS:
                differences = [loss - best.intermediate_values[step] for step, loss in enumerate(losses)]
                mean = statistics.fmean(differences)
                if mean > _STANDARD_ERRORS * statistics.stdev(differences) / math.sqrt(len(losses)):
                    trial.set_user_attr(_STOPPED, True)
                    return _loss(best) + mean
    except AdaPrunerError:
        return math.inf
    return statistics.fmean(losses)


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


def _result(
    study: optuna.Study, space: SearchSpace, trials: int, judge_further: Judge | None, finalists: int
) -> SearchResult:
    finished = _finished(study)[:trials]
    best_fixed = min((trial for trial in finished if FIXED_METRIC in trial.user_attrs), key=_loss)
    whole = sorted((trial for trial in finished if _STOPPED not in trial.user_attrs), key=_loss)
    # The best fixed metric is always judged again, to compare with; trials with the same candidate count once.
    distinct: dict[str, FrozenTrial] = {}
    for trial in [best_fixed, *whole]:
        distinct.setdefault(space.suggest(trial).model_dump_json(), trial)
    found = [
        _found(trial, space, judge_further)
        for trial in list(distinct.values())[: finalists + 1 if judge_further else None]
    ]
    return SearchResult(
        best=min(found, key=lambda one: one.loss),
        best_fixed=found[0],
        best_fixed_name=best_fixed.user_attrs[FIXED_METRIC],
        stopped=len(finished) - len(whole),
    )


def _found(trial: FrozenTrial, space: SearchSpace, judge_further: Judge | None) -> Found:
    candidate, losses = space.suggest(trial), list(trial.intermediate_values.values())
    if judge_further is None or not math.isfinite(_loss(trial)):
        return Found(candidate, _loss(trial), trial.number)
    losses += torch.cat(list(judge_further(candidate))).tolist()
    return Found(candidate, statistics.fmean(losses), trial.number)


def _loss(trial: FrozenTrial) -> float:
    return float(trial.values[0])
