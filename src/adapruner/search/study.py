"""The search: one loop of trials, proposed by Optuna and kept in a file, that resumes after a kill; its outcome."""

import contextlib
import math
import os
import random
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from adapruner.base.errors import AdaPrunerError, NonFiniteError, deferring_interrupts, first_problem, reason
from adapruner.search.space import FIXED_METRIC, START, Candidate, SearchSpace
from adapruner.text.windows import places_of

Judge = Callable[[Candidate], Iterable[Tensor]]

# User attributes of a trial: that it was stopped early, and the losses of the windows that it was judged on.
STOPPED, LOSSES = "stopped", "losses"
Parameter = float | int | str


class TriedPoint(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """A finished trial.

    Attributes:
        number: its place among the finished trials, in the order in which they were begun.
        loss: the mean increase over the dense model's, or the expected mean if the trial was stopped early; None if it
            is not finite.
        windows: how many it was judged on; none if its loss is not finite.
        starting_point: True if it was given, False if the sampler proposed it.
        fixed_metric: the name of the LLM-Pruner metric that was tried instead of searched values, if it was one.
        parameters: the searched values, by name.
    """

    number: int
    loss: float | None
    stopped: bool
    windows: int
    starting_point: bool
    fixed_metric: str | None
    parameters: dict[str, Parameter]


class SearchResult(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """The outcome of a search, with all finished trials.

    Attributes:
        points: in the order in which they were begun.
        trials: number of trials that were to be finished.
        best: the best of the candidates that were not stopped.
        best_loss: the mean over all windows; so is `best_fixed_loss`.
        by_kind: the same for the windows of each kind of text.
        best_trial: its number among `points`.
        best_fixed_name: of LLM-Pruner's metrics the best on the first random draw of samples; empty if none was tried.
        stopped_early: number of trials that were stopped early.
    """

    points: tuple[TriedPoint, ...]
    trials: int
    best: Candidate
    best_loss: float
    by_kind: dict[str, float] = {}
    best_trial: int
    best_fixed_loss: float | None = None
    best_fixed_name: str = ""
    stopped_early: int

    @property
    def searched(self) -> int:
        """The number of points that the sampler proposed."""
        return sum(not point.starting_point for point in self.points)


def choose(finished: Sequence[FrozenTrial], space: SearchSpace, trials: int, kinds: Sequence[str] = ()) -> SearchResult:
    """The best of the finished trials: by the mean over all windows, and over those of the kind of text that is hit
    most.

    Args:
        finished: in the order in which they were begun.
        trials: number of trials that were to be finished.
        kinds: of the windows; of an unknown kind if empty.
    """
    # By loss; trials that were stopped early were not judged on all windows.
    whole = sorted((trial for trial in finished if STOPPED not in trial.user_attrs), key=loss_of)
    fixed = [trial for trial in whole if FIXED_METRIC in trial.user_attrs]
    if not whole or not math.isfinite(loss_of(whole[0])):
        raise AdaPrunerError(
            f"none of the {len(finished)} trials has a finite loss: lower `ratio`, or try `dtype` float32"
        )

    def by_kind(trial: FrozenTrial) -> dict[str, float]:
        losses = trial.user_attrs[LOSSES]  # none if they are not finite
        places = places_of(kinds[: len(losses)])
        return {kind: statistics.fmean(losses[place] for place in own) for kind, own in places.items()}

    # The mean loss and that of the worst kind: no kind of text pays for the others.
    best = min(whole, key=lambda trial: loss_of(trial) + max(by_kind(trial).values(), default=loss_of(trial)))
    return SearchResult(
        points=tuple(
            TriedPoint(
                number=number,
                loss=loss_of(trial) if math.isfinite(loss_of(trial)) else None,
                stopped=STOPPED in trial.user_attrs,
                windows=len(trial.user_attrs[LOSSES]),
                starting_point=START in trial.user_attrs,
                fixed_metric=trial.user_attrs.get(FIXED_METRIC),
                parameters=dict(sorted(trial.params.items())),
            )
            for number, trial in enumerate(finished)
        ),
        trials=trials,
        best=space.suggest(best),
        best_loss=loss_of(best),
        by_kind=by_kind(best),
        best_trial=finished.index(best),
        best_fixed_loss=loss_of(fixed[0]) if fixed else None,
        best_fixed_name=fixed[0].user_attrs[FIXED_METRIC] if fixed else "",
        stopped_early=len(finished) - len(whole),
    )


def loss_of(trial: FrozenTrial) -> float:
    """The loss of a finished trial, which may be infinite."""
    return float(trial.values[0])


def compare(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean difference between finite losses and others on the same windows, and its standard error, which is infinite
    for a single window."""
    excess = [loss - other for loss, other in zip(losses, others, strict=True)]
    return statistics.fmean(excess), statistics.stdev(excess) / math.sqrt(len(excess)) if len(excess) > 1 else math.inf


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """While it lasts, Optuna does not log."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


# The loss of a trial, and user attributes.
_Outcome = tuple[float, dict[str, object]]
Progress = Callable[[float], None]

# A trial is stopped once it is worse than the best one by this many standard errors of the mean difference, on at least
# this many windows (research/experiments/early-stopping.md). It may be as good, but others will follow, and its
# expected loss is recorded.
# It is decided after every fourth window, for any batch size: the same on a GPU as on a CPU.
_FEWEST_WINDOWS, _DECIDED_EVERY, _STANDARD_ERRORS = 8, 4, 0.5


class _Attributes(TypedDict):
    """User attributes of a judged trial."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]  # of pydantic

    start: NotRequired[int]
    fixed_metric: NotRequired[str]
    losses: list[float]
    stopped: NotRequired[bool]


_ATTRIBUTES: dict[TrialState, TypeAdapter[object]] = {TrialState.COMPLETE: TypeAdapter(_Attributes)}


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
    """A search: its space, its judge and its trials.

    What is proposed depends on the seed and on the finished trials: a search that was killed and resumed proposes what
    an undisturbed one would have.

    Attributes:
        judge: gives the losses of a candidate on held-out windows, batch by batch, the same windows for each. It is not
            asked for more once the candidate is clearly worse than the best one so far, window by window.
        trials: number of trials to finish.
        study: the file of finished trials.
    """

    space: SearchSpace
    judge: Judge
    trials: int
    seed: int
    study: StudyFile

    def run(self, progress: Progress | None = None) -> None:
        """Runs trials until enough are finished; `progress` is called for each, earlier ones included, with the best
        loss so far. Ctrl-C stops it after a trial."""
        with deferring_interrupts("stopping after this trial; once more to stop at once") as raise_if_interrupted:
            trials = _Trials(self, progress)
            while trial := trials.propose():
                losses = self.judge(self.space.suggest(trial))
                trials.finish(trial, *_outcome(losses, None if FIXED_METRIC in trial.user_attrs else trials.best))
                raise_if_interrupted()

    def result(self, kinds: Sequence[str] = ()) -> SearchResult:
        """The best of the finished trials; see `choose`."""
        finished = self.study.opened().get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return choose(finished, self.space, self.trials, kinds)


class _Trials:
    """The trials of a search: they are proposed in memory, and kept when they are finished.

    Attributes:
        kept: the study in the file.
        study: the study in memory.
    """

    def __init__(self, search: Search, progress: Progress | None) -> None:
        self.search, self.progress, self.kept = search, progress, search.study.opened()
        with quiet_optuna():
            self.study = optuna.create_study()
        self.study.add_trials(self.kept.get_trials(deepcopy=False))
        for number in range(len(self._finished)):
            self._report(number + 1)

    @property
    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    @property
    def best(self) -> FrozenTrial | None:
        """The finished trial with the lowest loss, if one has a finite loss."""
        return min((trial for trial in self._finished if math.isfinite(loss_of(trial))), key=loss_of, default=None)

    def propose(self) -> optuna.Trial | None:
        """The next trial; None if enough are finished."""
        search, before = self.search, len(self._finished)
        if before >= search.trials:
            return None
        if before < len(starts := search.space.starting_points()):
            self.study.enqueue_trial(starts[before].parameters, user_attrs=starts[before].attributes | {START: before})
        self.study.sampler = _sampler(random.Random(f"{search.seed}/{before}").getrandbits(32))
        return self.study.ask()

    def finish(self, trial: optuna.Trial, loss: float, attributes: dict[str, object]) -> None:
        """Keeps a trial."""
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        self.kept.add_trial(self.study.tell(trial, loss))
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
            if best and len(losses) >= _FEWEST_WINDOWS and not len(losses) % _DECIDED_EVERY:
                excess, standard_error = compare(losses, best.user_attrs[LOSSES][: len(losses)])
                if excess > _STANDARD_ERRORS * standard_error:
                    return loss_of(best) + excess, {STOPPED: True, LOSSES: losses}
    except NonFiniteError:
        losses = []
    return statistics.fmean(losses) if losses else math.inf, {LOSSES: losses}


def _sampler(seed: int) -> optuna.samplers.TPESampler:
    """A sampler for one trial."""
    with warnings.catch_warnings():
        # Optuna calls these experimental; without `group`, trials with few given parameters switch `multivariate` off.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)
