"""The search itself: an Optuna study that resumes after a kill, and that several processes can work on."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from adapruner.config import Sampler
from adapruner.errors import NonFiniteError
from adapruner.interrupts import deferring_interrupts
from adapruner.planning import BudgetError
from adapruner.search._history import LOSSES, STOPPED, TriedPoint, loss_of, point_of
from adapruner.search._place import StudyPlace
from adapruner.search._result import Judge, SearchResult, choose
from adapruner.search._space import FIXED_METRIC, START, Candidate, SearchSpace

JudgeTogether = Callable[[Sequence[Candidate]], Sequence[Iterable[Tensor]]]
_Trials = dict[TrialState, list[FrozenTrial]]

# A trial is stopped once it has been worse than the best one on so many windows, by so many standard errors of the mean
# difference (docs/experiments.md). It may be as good, but there will be others, and it counts with what it is likely
# to be. It is decided after every fourth window, however many a batch has: on a GPU as on a CPU.
_FEWEST_WINDOWS, _DECIDED_EVERY, _STANDARD_ERRORS = 8, 4, 0.5
# Trials that are judged together. Each is proposed without knowing what the others will come to.
JUDGED_TOGETHER = 4
# A user attribute: whether a trial is run beside the process that leads, or by that process.
_HELPER = "helper"
# A process marks its trial after it has created it, which takes long where many write to one file.
_SECONDS_TO_MARK, _SECONDS_TO_LOOK = 10.0, 0.2


@dataclass(frozen=True)
class Search:
    """A search and what it is made of.

    What is proposed depends on the seed and on the finished trials alone, so that a search by one process that was
    killed and resumed proposes what an undisturbed one would have (unless it was killed while it recorded trials that
    were judged together). Of several processes, each takes account of what the others are running (constant liar,
    Ginsbourger et al. 2010).

    Attributes:
        judge: gives the losses of a candidate on held-out windows, batch by batch, the same windows for each. It is not
            asked for more once the candidate is clearly worse than the best one so far, window by window.
        trials: how many are to be finished.
        place: where every trial is recorded.
        stops_early: whether bad trials are stopped before they have seen all windows.
        judge_together: gives the losses of several candidates on the same windows, where that is cheaper than one by
            one; four trials are judged at a time then, and none is stopped.
    """

    space: SearchSpace
    judge: Judge
    trials: int
    seed: int
    place: StudyPlace
    sampler: Sampler = "tpe"
    stops_early: bool = True
    judge_together: JudgeTogether | None = None

    def run(self, progress: Callable[[TriedPoint, float], None] | None = None) -> None:
        """Runs trials until enough are finished, by this process or by others. Ctrl-C stops it after a trial. One
        process at a time may do so; any number may `help`.

        Args:
            progress: called after every finished trial, also for those of before, with it and the best loss so far.
        """
        reported = 0
        with self._working() as (study, raise_if_interrupted):
            _discard_trials_of_a_killed_leader(study)
            while True:
                raise_if_interrupted()
                is_over = self._queue_starting_points(study)
                trials = _by_state(study)
                finished = trials[TrialState.COMPLETE]
                for count in range(reported + 1, min(len(finished), self.trials) + 1):
                    reported = count
                    if progress:
                        progress(point_of(count - 1, finished[count - 1]), min(map(loss_of, finished[:count])))
                if is_over and not any(FIXED_METRIC in trial.user_attrs for trial in trials[TrialState.WAITING]):
                    return
                # If others have finished the last one since, the lost fixed metrics are queued first.
                if is_over or not self._is_enough(trials):
                    self._run_trial(study, trials, helps=False)

    def help(self) -> None:
        """Runs trials beside the process that leads, as long as more are wanted than are finished or running."""
        with self._working() as (study, raise_if_interrupted):
            while True:
                raise_if_interrupted()
                trials = _by_state(study)
                if self._is_enough(trials, with_running=True):
                    return
                self._run_trial(study, trials, helps=True)

    def result(self, judge_further: Judge | None = None, judge_changed: Judge | None = None) -> SearchResult:
        """The best of the finished trials; see `choose` for the judges.

        Raises:
            AdaPrunerError: no trial ended with a finite loss.
        """
        with self.place.opened() as study:
            finished = _by_state(study)[TrialState.COMPLETE]
        return choose(finished, self.space, self.trials, judge_further, judge_changed)

    @contextlib.contextmanager
    def _working(self) -> Iterator[tuple[optuna.Study, Callable[[], None]]]:
        with (
            self.place.opened() as study,
            deferring_interrupts("stopping after this trial; once more to stop at once") as raise_if_interrupted,
        ):
            yield study, raise_if_interrupted

    def _is_enough(self, trials: _Trials, with_running: bool = False) -> bool:
        """Whether so many trials are enough, or as many proposals could not be met."""
        begun = len(trials[TrialState.COMPLETE]) + with_running * len(trials[TrialState.RUNNING])
        return max(begun, len(trials[TrialState.PRUNED])) >= self.trials

    def _queue_starting_points(self, study: optuna.Study) -> bool:
        """Queues the starting points that nobody has tried, is trying or will try; in their order, because each is
        compared with the best before it. At the end, the fixed metrics alone, also those that others are trying: the
        result is compared with them, and nobody is waited for.

        Returns:
            Whether it is the end: enough trials are finished.
        """
        trials = _by_state(study)
        is_over = self._is_enough(trials)
        starts = dict(enumerate(self.space.starting_points()[: self.trials]))
        states = [TrialState.COMPLETE, TrialState.PRUNED]
        if is_over:
            starts = {number: start for number, start in starts.items() if FIXED_METRIC in start.attributes}
        else:
            states.append(TrialState.RUNNING)
        queued = trials[TrialState.WAITING]
        missing = starts.keys() - {trial.user_attrs.get(START) for state in states for trial in trials[state]}
        if missing <= {trial.user_attrs.get(START) for trial in queued}:
            return is_over
        if queued:  # those before them have been lost; a trial without a number fails
            study.sampler = optuna.samplers.RandomSampler()
            study.optimize(lambda _: math.nan, n_trials=len(queued))
        for number in sorted(missing):
            study.enqueue_trial(starts[number].parameters, user_attrs=starts[number].attributes | {START: number})
        return is_over

    def _run_trial(self, study: optuna.Study, trials: _Trials, helps: bool) -> None:
        finished, refused = trials[TrialState.COMPLETE], trials[TrialState.PRUNED]
        # Proposals that could not be met count, or the same would be proposed again.
        counts = [len(finished), *filter(None, [len(refused)])]
        own = random.Random("/".join(map(str, [self.seed, *counts])))
        seed = (random.SystemRandom() if helps else own).getrandbits(32)
        beside_others = helps or any(trial.user_attrs.get(_HELPER) for trial in trials[TrialState.RUNNING])
        study.sampler = _sampler(self.sampler, seed, beside_others)
        best = min((trial for trial in finished if math.isfinite(loss_of(trial))), key=loss_of, default=None)
        left = self.trials - len(finished) - len(trials[TrialState.RUNNING])
        beside = min(JUDGED_TOGETHER, left) - 1 if self.judge_together else 0

        def run(trial: optuna.Trial) -> float:
            trial.set_user_attr(_HELPER, helps)
            others = [self._ask(study, seed + number, helps) for number in range(1, beside + 1)]
            return self._run_together(study, [trial, *others], best)

        try:
            study.optimize(run, n_trials=1)
        except (UpdateFinishedTrialError, ValueError) as error:
            # Another process took this one for dead and has failed its trial, or has finished it: SQLite does not keep
            # two processes from taking one queued trial.
            if isinstance(error, ValueError) and "Cannot tell a" not in str(error):
                raise

    def _ask(self, study: optuna.Study, seed: int, helps: bool) -> optuna.Trial:
        """A further trial, proposed beside those that are running."""
        study.sampler = _sampler(self.sampler, seed, beside_others=True)
        with warnings.catch_warnings():
            # Of trials that are asked for, Optuna sends no heartbeat: that of the trial they are judged with stands for
            # them.
            warnings.filterwarnings("ignore", message="Heartbeat of storage")
            trial = study.ask()
        trial.set_user_attr(_HELPER, helps)
        return trial

    def _run_together(self, study: optuna.Study, trials: Sequence[optuna.Trial], best: FrozenTrial | None) -> float:
        """Judges trials and records all but the first one, whose value is returned for Optuna to record.

        Raises:
            TrialPruned: the budget of the first one cannot be met.
        """
        candidates = [self.space.suggest(trial) for trial in trials]
        if self.judge_together is None:
            # The judge may refuse a candidate when it is called, or later.
            return self._value(trials[0], chain.from_iterable(map(self.judge, candidates)), best)
        first, *others = self.judge_together(candidates)
        for trial, losses in zip(trials[1:], others, strict=True):
            try:
                study.tell(trial, self._value(trial, losses, None))
            except optuna.TrialPruned:
                study.tell(trial, state=TrialState.PRUNED)
        return self._value(trials[0], first, None)

    def _value(self, trial: optuna.Trial, batches: Iterable[Tensor], best: FrozenTrial | None) -> float:
        """The mean loss of a candidate over all windows, or what it is likely to be where it was stopped; infinite
        where the model is broken.

        Windows differ far more than candidates do, which is why candidates are compared window by window.

        Args:
            batches: its losses.
            best: the trial to stop it by; None stops nothing.

        Raises:
            TrialPruned: the budget cannot be met.
        """
        if not self.stops_early or FIXED_METRIC in trial.user_attrs:
            best = None
        losses: list[float] = []
        try:
            for loss in (loss for batch in batches for loss in batch.tolist()):
                losses.append(loss)
                if not math.isfinite(loss):
                    raise NonFiniteError
                if best and (excess := _excess(losses, best.user_attrs[LOSSES])):
                    trial.set_user_attr(STOPPED, True)
                    trial.set_user_attr(LOSSES, losses)
                    return loss_of(best) + excess
        except BudgetError as error:
            raise optuna.TrialPruned from error
        except NonFiniteError:
            losses = []
        trial.set_user_attr(LOSSES, losses)
        return statistics.fmean(losses) if losses else math.inf


def _excess(losses: Sequence[float], best: Sequence[float]) -> float:
    """By how much a candidate is clearly worse than the best one on its windows so far; 0 where that is not clear, and
    between the windows after which it is decided."""
    if len(losses) < _FEWEST_WINDOWS or len(losses) % _DECIDED_EVERY:
        return 0.0
    differences = [own - others for own, others in zip(losses, best, strict=False)]
    mean = statistics.fmean(differences)
    return mean if mean > _STANDARD_ERRORS * statistics.stdev(differences) / math.sqrt(len(losses)) else 0.0


def _sampler(kind: Sampler, seed: int, beside_others: bool) -> optuna.samplers.BaseSampler:
    """A sampler for one trial.

    Args:
        beside_others: whether other processes run trials that count as bad until they are finished.
    """
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # Optuna calls these options experimental; without `group`, trials that are given a part would switch
        # `multivariate` off.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=beside_others)


def _discard_trials_of_a_killed_leader(study: optuna.Study) -> None:
    """Fails the running trials of a leader that was killed. Those that stay unmarked count as its own."""

    def running() -> dict[int, bool | None]:
        trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return {trial.number: trial.user_attrs.get(_HELPER) for trial in trials}

    left, until = running(), time.monotonic() + _SECONDS_TO_MARK
    while None in left.values() and time.monotonic() < until:
        time.sleep(_SECONDS_TO_LOOK)
        now = running()
        left = {number: now[number] for number in left.keys() & now.keys()}
    for number in (number for number, is_helper in left.items() if not is_helper):
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _by_state(study: optuna.Study) -> _Trials:
    """In the order in which they were begun."""
    trials = study.get_trials(deepcopy=False)
    return {state: [trial for trial in trials if trial.state == state] for state in TrialState}
