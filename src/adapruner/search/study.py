"""The search itself: one loop of trials, proposed by Optuna and kept in a file, that resumes after a kill."""

from __future__ import annotations

import math
import os
import random
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from adapruner.base.errors import AdaPrunerError, NonFiniteError, first_problem, reason
from adapruner.base.processes import deferring_interrupts
from adapruner.search.judging import JUDGED_TOGETHER
from adapruner.search.result import LOSSES, STOPPED, Judge, SearchResult, choose, compare, loss_of, quiet_optuna
from adapruner.search.space import FIXED_METRIC, START, Candidate, SearchSpace

# The loss of a trial, and user attributes.
_Outcome = tuple[float, dict[str, Any]]
Progress = Callable[[float], None]

# A trial is stopped once it is worse than the best one by this many standard errors of the mean difference, on at least
# this many windows (research/experiments/early-stopping.md). It may be as good, but others will follow, and its
# expected loss is recorded.
# It is decided after every fourth window, for any batch size: the same on a GPU as on a CPU.
_FEWEST_WINDOWS, _DECIDED_EVERY, _STANDARD_ERRORS = 8, 4, 0.5
# A user attribute: the number of trials that were finished when the batch of a trial was proposed, and its size.
_BATCH = "batch"


class _Attributes(TypedDict):
    """User attributes of a judged trial."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]  # of pydantic

    batch: Annotated[list[int], Field(min_length=2, max_length=2)]
    start: NotRequired[int]
    fixed_metric: NotRequired[str]
    losses: list[float]
    stopped: NotRequired[bool]


_ATTRIBUTES: dict[TrialState, TypeAdapter[Any]] = {TrialState.COMPLETE: TypeAdapter(_Attributes)}


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
        """The study, to add trials to; created if it does not exist. One process at a time may add trials."""
        # A kill leaves Optuna's lock, which it would wait for; a kill or a full disk leaves an incomplete line.
        Path(f"{self.path}.lock").unlink(missing_ok=True)
        if self.path.is_file() and (content := self.path.read_bytes()) and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)
        try:
            # Optuna's default lock is a link, which users of Windows may not create.
            storage = JournalStorage(JournalFileBackend(str(self.path), JournalFileOpenLock(str(self.path))))
        except OSError:
            raise
        except Exception as error:  # lines that are not JSON, or JSON of something else
            raise self._damaged(reason(error)) from None
        with quiet_optuna():
            study = optuna.create_study(storage=storage, study_name=self.name, load_if_exists=True)
        try:
            for trial in study.get_trials(deepcopy=False):
                _ATTRIBUTES[trial.state].validate_python(trial.user_attrs)
        except KeyError:
            raise self._damaged("a trial in it is not finished") from None
        except ValidationError as error:
            raise self._damaged(first_problem(error)) from None
        return study

    def _damaged(self, problem: str) -> AdaPrunerError:
        return AdaPrunerError(f"{self.path} is damaged ({problem}): remove it to repeat the search")


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
    judge_together: Callable[[Sequence[Candidate]], Iterable[Iterable[Tensor]]] | None = None

    def run(self, progress: Progress | None = None) -> None:
        """Runs trials until enough are finished; `progress` is called for each, earlier ones included, with the best
        loss so far. Ctrl-C stops it after a batch of trials."""
        with deferring_interrupts("stopping after this trial; once more to stop at once") as raise_if_interrupted:
            trials = _Trials(self, progress)
            while proposed := trials.propose():
                candidates = [self.space.suggest(trial) for trial in proposed]
                best = None if self.judge_together else trials.best
                losses = self.judge_together(candidates) if self.judge_together else map(self._judge, candidates)
                outcomes = [
                    _outcome(batches, None if FIXED_METRIC in trial.user_attrs else best)
                    for trial, batches in zip(proposed, losses, strict=True)
                ]
                trials.finish(proposed, outcomes)
                raise_if_interrupted()

    def _judge(self, candidate: Candidate) -> Iterator[Tensor]:
        """The judge may refuse a candidate when it is called, or later."""
        yield from self.judge(candidate)

    def result(self, kinds: Sequence[str] = ()) -> SearchResult:
        """The best of the finished trials; see `choose`."""
        finished = self.study.opened().get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return choose(finished, self.space, self.trials, kinds)


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
        self._interrupted = 0
        kept = self.kept.get_trials(deepcopy=False)
        before, size = kept[-1].user_attrs[_BATCH] if kept else (0, 0)
        if len(kept) < before + size:
            self._interrupted, kept = size, kept[:before]
        self.study.add_trials(kept)
        for number in range(len(self._finished)):
            self._report(number + 1)

    @property
    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    @property
    def best(self) -> FrozenTrial | None:
        """The finished trial with the lowest loss, if one has a finite loss."""
        return min((trial for trial in self._finished if math.isfinite(loss_of(trial))), key=loss_of, default=None)

    def propose(self) -> list[optuna.Trial]:
        """The next batch; empty if enough trials are finished."""
        search, before = self.search, len(self._finished)
        if before >= search.trials:
            return []
        seed = random.Random(f"{search.seed}/{before}").getrandbits(32)
        most = JUDGED_TOGETHER if search.judge_together else 1
        size = self._interrupted or min(most, search.trials - before)
        self._interrupted = 0
        for number, start in list(enumerate(search.space.starting_points()[: search.trials]))[before : before + size]:
            self.study.enqueue_trial(start.parameters, user_attrs=start.attributes | {START: number})
        proposed = []
        for number in range(size):
            self.study.sampler = _sampler((seed + number) % 2**32, beside_others=number > 0)
            proposed.append(self.study.ask())
        for trial in proposed:
            trial.set_user_attr(_BATCH, [before, size])
        return proposed

    def finish(self, proposed: Sequence[optuna.Trial], outcomes: Sequence[_Outcome]) -> None:
        """Keeps the trials of a batch, in its order."""
        for trial, (loss, attributes) in zip(proposed, outcomes, strict=True):
            for name, value in attributes.items():
                trial.set_user_attr(name, value)
            finished = self.study.tell(trial, loss)
            if finished.number == len(self.kept.get_trials(deepcopy=False)):
                self.kept.add_trial(finished)
            self._report(len(self._finished))

    def _report(self, count: int) -> None:
        """Reports the best loss of the first finished trials."""
        if self.progress:
            self.progress(min(map(loss_of, self._finished[:count])))


def _outcome(batches: Iterable[Tensor], best: FrozenTrial | None) -> _Outcome:
    """The mean loss of a candidate over all windows, or its expected loss if it was stopped because it is worse than
    the best trial, if one is given; infinite if the model is broken.

    Windows differ far more than candidates do, so candidates are compared window by window.
    """
    losses: list[float] = []
    try:
        for loss in (loss for batch in batches for loss in batch.tolist()):
            losses.append(loss)
            if not math.isfinite(loss):
                raise NonFiniteError
            if best and (excess := _excess(losses, best.user_attrs[LOSSES])):
                return loss_of(best) + excess, {STOPPED: True, LOSSES: losses}
    except NonFiniteError:
        losses = []
    return statistics.fmean(losses) if losses else math.inf, {LOSSES: losses}


def _excess(losses: Sequence[float], best: Sequence[float]) -> float:
    """Mean excess of a candidate over the best one on its windows so far; 0 if it is not clear, and between the windows
    after which it is decided."""
    if len(losses) < _FEWEST_WINDOWS or len(losses) % _DECIDED_EVERY:
        return 0.0
    excess, standard_error = compare(losses, best[: len(losses)])
    return excess if excess > _STANDARD_ERRORS * standard_error else 0.0


def _sampler(seed: int, beside_others: bool) -> optuna.samplers.TPESampler:
    """A sampler for one trial; other running trials, if there are any, count as bad until they are finished."""
    with warnings.catch_warnings():
        # Optuna calls these options experimental; without `group`, trials with few given parameters would switch
        # `multivariate` off.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=beside_others)
