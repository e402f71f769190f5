"""The search itself: an Optuna study that goes on where it was killed, and that several processes can work on."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from adapruner.errors import AdaPrunerError
from adapruner.interrupts import deferring_interrupts
from adapruner.search._shared import StudyPlace
from adapruner.search._space import FIXED_METRIC, Candidate, SearchSpace

Judge = Callable[[Candidate], Iterable[Tensor]]

# A trial is stopped once it has been worse than the best one on so many windows, by so many standard errors of the mean
# difference (see docs/benchmarks.md). It may be as good, but there will be others, and it counts with what it is likely
# to be.
_FEWEST_WINDOWS, _STANDARD_ERRORS = 8, 0.5
STOPPED = "stopped"
# Which of the starting points a trial is.
_START = "start"


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


@dataclass(frozen=True)
class Search:
    """A search and what it is made of.

    What is proposed depends on the seed and on the finished trials alone, so that a search by one process that was
    killed and continued proposes what an undisturbed one would have. Of several processes, each takes account of what
    the others are at (constant liar, Ginsbourger et al. 2010).

    Attributes:
        judge: gives the losses of a candidate on held-out windows, batch by batch, the same windows for each. It is not
            asked for more once the candidate is clearly worse than the best one so far, window by window.
        trials: how many are to be finished.
        place: where every trial is recorded.
        stops_early: whether bad trials are stopped before they have seen all windows.
    """

    space: SearchSpace
    judge: Judge
    trials: int
    seed: int
    place: StudyPlace
    sampler: Literal["tpe", "random"] = "tpe"
    stops_early: bool = True

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        """Runs trials until all are finished, by this process or by others. Ctrl-C stops it after a trial.

        Args:
            progress: called after every finished trial, also for those of before, with the best loss so far.
        """
        for finished in self._work(self.trials):
            if progress:
                progress(min(map(_loss, finished)))

    def help(self, name: str) -> None:
        """Runs trials beside the process that runs the search, as long as there are any that nobody is at.

        Args:
            name: of this helper, different from those of others; it goes into what it proposes.
        """
        for _ in self._work(self.trials, name):
            pass

    def result(self, judge_further: Judge | None = None, finalists: int = 3) -> SearchResult:
        """The best of the finished trials, judged on further windows.

        Args:
            judge_further: the same as `judge`, on further windows. The best of many trials owes part of its loss to the
                windows it was chosen on; None takes it as it is.
            finalists: how many are judged further.
        """
        with self.place.opened() as study:
            return _result(study, self.space, self.trials, judge_further, finalists)

    def _work(self, wanted: int, helper: str | None = None) -> Iterator[list[FrozenTrial]]:
        """Yields the finished trials up to each, in the order in which they were begun."""
        reported = 0
        with (
            self.place.opened() as study,
            self.place.working() as worker,
            deferring_interrupts("stopping after this trial; once more to stop at once") as raise_if_interrupted,
        ):
            while True:
                raise_if_interrupted()
                with worker.asking():
                    worker.drop_abandoned(study)
                    finished = _finished(study)
                    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
                    is_enough = len(finished) + (len(running) if helper else 0) >= wanted
                    if is_enough and not helper and not any(map(_is_fixed, finished)):
                        # The only one is still with somebody else, and the result is compared with it.
                        is_enough, running = False, []
                    if not is_enough:
                        trial = self._ask(study, len(finished), running, helper)
                        worker.claim(trial)
                while reported < min(len(finished), wanted):
                    reported += 1
                    yield finished[:reported]
                if is_enough:
                    return
                may_stop = self.stops_early and FIXED_METRIC not in trial.user_attrs
                # Whoever took this process for dead has given the trial to another.
                with contextlib.suppress(UpdateFinishedTrialError):
                    value = _judged(trial, self.space.suggest(trial), self.judge, may_stop)
                    study.tell(trial, value, skip_if_finished=True)

    def _ask(self, study: optuna.Study, finished: int, running: list[FrozenTrial], helper: str | None) -> optuna.Trial:
        seed = f"{self.seed}/{finished}" + (f"/{helper}" if helper else "")
        study.sampler = _sampler(self.sampler, random.Random(seed).getrandbits(32))
        # What a kill has left between the two calls below is taken up.
        if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            begun = {trial.user_attrs.get(_START) for trial in [*_finished(study), *running]}
            starts = enumerate(self.space.starting_points())
            start = next(((number, point) for number, point in starts if number not in begun), None)
            if start is None:
                study.enqueue_trial({}, user_attrs=self.space.given())
            else:
                number, point = start
                study.enqueue_trial(point.parameters, user_attrs=point.attributes | {_START: number})
        trial = study.ask()
        self.space.suggest(trial)
        return trial


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
                    trial.set_user_attr(STOPPED, True)
                    return _loss(best) + mean
    except AdaPrunerError:
        return math.inf
    return statistics.fmean(losses)


def _sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # Optuna calls these options experimental; without `group`, trials that are given a part would switch
        # `multivariate` off.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _result(
    study: optuna.Study, space: SearchSpace, trials: int, judge_further: Judge | None, finalists: int
) -> SearchResult:
    finished = _finished(study)
    if any(map(_is_fixed, finished[:trials])):
        finished = finished[:trials]
    best_fixed = min(filter(_is_fixed, finished), key=_loss)
    whole = sorted((trial for trial in finished if STOPPED not in trial.user_attrs), key=_loss)
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


def _is_fixed(trial: FrozenTrial) -> bool:
    return FIXED_METRIC in trial.user_attrs


def _loss(trial: FrozenTrial) -> float:
    return float(trial.values[0])
