"""The search itself: one loop of trials, proposed by Optuna, that resumes after a kill."""

from __future__ import annotations

import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from adapruner.errors import NonFiniteError
from adapruner.interrupts import deferring_interrupts
from adapruner.planning._budget import BudgetError
from adapruner.search._history import LOSSES, STOPPED, compare, loss_of
from adapruner.search._objective import JUDGED_TOGETHER
from adapruner.search._result import Judge, SearchResult, choose
from adapruner.search._space import FIXED_METRIC, START, Candidate, SearchSpace
from adapruner.search._study_file import StudyFile, quiet_optuna

JudgeTogether = Callable[[Sequence[Candidate]], Sequence[Iterable[Tensor]]]
Progress = Callable[[float], None]

# A trial is stopped once it is worse than the best one by this many standard errors of the mean difference, on at least
# this many windows (research/experiments/early-stopping.md). It may be as good, but others will follow, and its
# expected loss is recorded.
# It is decided after every fourth window, for any batch size: the same on a GPU as on a CPU.
_FEWEST_WINDOWS, _DECIDED_EVERY, _STANDARD_ERRORS = 8, 4, 0.5
# A user attribute: the number of trials that were finished when the batch of a trial was proposed, and its size.
_BATCH = "batch"


class _Task(NamedTuple):
    """A candidate to judge, and the best trial, which stops it if it is clearly worse; None stops nothing."""

    candidate: Candidate
    best: FrozenTrial | None


class _Outcome(NamedTuple):
    """The outcome of a trial; the loss is None if its budget cannot be met."""

    loss: float | None
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Search:
    """A search: its space, its judges and its trials.

    Trials are proposed in batches. All of a batch are proposed before any of them is judged, each with those before it
    counted as bad (constant liar, Ginsbourger et al. 2010). What is proposed depends on the seed and on the trials of
    finished batches: a search that was killed and resumed proposes what an undisturbed one would have.

    Attributes:
        judge: gives the losses of a candidate on held-out windows, batch by batch, the same windows for each. It is not
            asked for more once the candidate is clearly worse than the best one so far, window by window.
        trials: number of trials to finish.
        study: the file of finished trials.
        judge_together: gives the losses of several candidates on the same windows, if that is cheaper than one by one;
            a batch then has four candidates instead of one, and none is stopped.
    """

    space: SearchSpace
    judge: Judge
    trials: int
    seed: int
    study: StudyFile
    judge_together: JudgeTogether | None = None

    def run(self, progress: Progress | None = None) -> None:
        """Runs trials until enough are finished. Ctrl-C stops it after a batch of trials.

        Args:
            progress: called for every finished trial, earlier ones included, with the best loss so far.
        """
        with deferring_interrupts("stopping after this trial; once more to stop at once") as raise_if_interrupted:
            trials = _Trials(self, progress)
            while tasks := trials.propose():
                trials.finish(self._judge(tasks))
                raise_if_interrupted()

    def result(self, judge_further: Judge | None = None) -> SearchResult:
        """The best of the finished trials; see `choose`.

        Raises:
            AdaPrunerError: no trial ended with a finite loss.
        """
        return choose(self.study.finished(), self.space, self.trials, judge_further)

    def _judge(self, tasks: Sequence[_Task]) -> list[_Outcome]:
        candidates = [task.candidate for task in tasks]
        if self.judge_together:
            losses = self.judge_together(candidates)
        else:
            losses = [self._judge_when_asked(candidate) for candidate in candidates]
        return [_outcome(batches, task.best) for task, batches in zip(tasks, losses, strict=True)]

    def _judge_when_asked(self, candidate: Candidate) -> Iterator[Tensor]:
        """The judge may refuse a candidate when it is called, or later."""
        yield from self.judge(candidate)


class _Trials:
    """The trials of a search: they are proposed in memory, and kept when they are finished.

    Attributes:
        kept: the study in the file. If the search was killed while a batch was being kept, it ends with a part of it.
        study: the study in memory, of whole batches.
        _interrupted: the size of a batch that was kept in part; it is proposed again.
    """

    def __init__(self, search: Search, progress: Progress | None) -> None:
        self.search, self.progress, self.kept = search, progress, search.study.opened()
        with quiet_optuna():
            self.study = optuna.create_study()
        self._running: list[optuna.Trial] = []
        self._interrupted = 0
        kept = self.kept.get_trials(deepcopy=False)
        before, size = kept[-1].user_attrs[_BATCH] if kept else (0, 0)
        if len(kept) < before + size:
            self._interrupted, kept = size, kept[:before]
        self.study.add_trials(kept)
        for number in range(len(self._finished)):
            self._report(number)

    @property
    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def propose(self) -> list[_Task]:
        """The next batch; empty if enough trials are finished, or the budget of as many proposals could not be met."""
        search, finished = self.search, self._finished
        before = len(self.study.get_trials(deepcopy=False))
        refused = before - len(finished)
        if max(len(finished), refused) >= search.trials:
            return []
        # Proposals that could not be met count, or the same would be proposed again.
        counts = [len(finished), *filter(None, [refused])]
        seed = random.Random("/".join(map(str, [search.seed, *counts]))).getrandbits(32)
        most = JUDGED_TOGETHER if search.judge_together else 1
        size = self._interrupted or min(most, search.trials - len(finished))
        self._interrupted = 0
        for number, start in list(enumerate(search.space.starting_points()[: search.trials]))[before : before + size]:
            self.study.enqueue_trial(start.parameters, user_attrs=start.attributes | {START: number})
        self._running = []
        for number in range(size):
            self.study.sampler = _sampler((seed + number) % 2**32, beside_others=number > 0)
            self._running.append(self.study.ask())
        for trial in self._running:
            trial.set_user_attr(_BATCH, [before, size])
        best = min((trial for trial in finished if math.isfinite(loss_of(trial))), key=loss_of, default=None)
        return [
            _Task(
                search.space.suggest(trial),
                best if not (search.judge_together or FIXED_METRIC in trial.user_attrs) else None,
            )
            for trial in self._running
        ]

    def finish(self, outcomes: Sequence[_Outcome]) -> None:
        """Keeps the trials of the batch that was proposed last, in its order."""
        for trial, outcome in zip(self._running, outcomes, strict=True):
            for name, value in outcome.attributes.items():
                trial.set_user_attr(name, value)
            state = TrialState.PRUNED if outcome.loss is None else TrialState.COMPLETE
            finished = self.study.tell(trial, outcome.loss, state)
            if finished.number == len(self.kept.get_trials(deepcopy=False)):
                self.kept.add_trial(finished)
            if state == TrialState.COMPLETE:
                self._report(len(self._finished) - 1)

    def _report(self, number: int) -> None:
        if self.progress:
            self.progress(min(map(loss_of, self._finished[: number + 1])))


def _outcome(batches: Iterable[Tensor], best: FrozenTrial | None) -> _Outcome:
    """The mean loss of a candidate over all windows, or its expected loss if it was stopped; infinite if the model is
    broken.

    Windows differ far more than candidates do, so candidates are compared window by window.

    Args:
        batches: its losses.
        best: the trial to stop it by; None stops nothing.
    """
    losses: list[float] = []
    try:
        for loss in (loss for batch in batches for loss in batch.tolist()):
            losses.append(loss)
            if not math.isfinite(loss):
                raise NonFiniteError
            if best and (excess := _excess(losses, best.user_attrs[LOSSES])):
                return _Outcome(loss_of(best) + excess, {STOPPED: True, LOSSES: losses})
    except BudgetError:
        return _Outcome(None, {})
    except NonFiniteError:
        losses = []
    return _Outcome(statistics.fmean(losses) if losses else math.inf, {LOSSES: losses})


def _excess(losses: Sequence[float], best: Sequence[float]) -> float:
    """Mean excess of a candidate over the best one on its windows so far; 0 if it is not clear, and between the windows
    after which it is decided."""
    if len(losses) < _FEWEST_WINDOWS or len(losses) % _DECIDED_EVERY:
        return 0.0
    excess, standard_error = compare(losses, best[: len(losses)])
    return excess if excess > _STANDARD_ERRORS * standard_error else 0.0


def _sampler(seed: int, beside_others: bool) -> optuna.samplers.TPESampler:
    """A sampler for one trial.

    Args:
        beside_others: True if other trials are running, which count as bad until they are finished.
    """
    with warnings.catch_warnings():
        # Optuna calls these options experimental; without `group`, trials with few given parameters would switch
        # `multivariate` off.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=beside_others)
