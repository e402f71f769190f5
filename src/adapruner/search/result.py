"""The outcome of a search: its trials, of which one is chosen."""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial
from pydantic import BaseModel
from torch import Tensor

from adapruner.base.errors import AdaPrunerError
from adapruner.search.space import FIXED_METRIC, START, Candidate, SearchSpace
from adapruner.text.windows import places_of

Judge = Callable[[Candidate], Iterable[Tensor]]

# User attributes of a trial: that it was stopped early, and the losses of the windows that it was judged on.
STOPPED, LOSSES = "stopped", "losses"
# Minimum number of searched points for the importance of parameters: PED-ANOVA compares the best tenth with all, and
# fewer than ten trials are chance.
_FEWEST_POINTS = 100

Parameter = float | int | str
StepName = Literal["fixed metric", "starting point", "searched"]


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
        positions: the same within their ranges, 0 to 1.
    """

    number: int
    loss: float | None
    stopped: bool
    windows: int
    starting_point: bool
    fixed_metric: str | None
    parameters: dict[str, Parameter]
    positions: dict[str, float]


class Step(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """A step from a choice without a search to the outcome of the search; all are compensated in the same way.

    Attributes:
        name: the best of LLM-Pruner's metrics, the best starting point, the best point that the sampler proposed.
        trial: its number among `points`.
        candidate: the candidate of that trial.
        loss: mean over `windows`.
        windows: number of windows that the steps are compared on: those on which their trials were picked, where the
            best of many looks better than it is.
        gain: the loss of the step before minus this loss, in nats per predicted token; None for the first.
        standard_error: of the gain, from the differences window by window; None if there is only one window.
    """

    name: StepName
    trial: int
    candidate: Candidate
    loss: float
    windows: int
    gain: float | None = None
    standard_error: float | None = None


class SearchResult(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """The outcome of a search, with all finished trials.

    Attributes:
        points: in the order in which they were begun.
        ranges: both ends of the range of every parameter, or its choices.
        importance: the share of each parameter in the difference between the best trials and the others (PED-ANOVA,
            Watanabe et al., arXiv 2304.10255), largest first; empty if there are too few trials.
        trials: number of trials that were to be finished.
        best: the best of the candidates that were not stopped.
        best_loss: the mean over all windows; so is `best_fixed_loss`.
        by_kind: the same for the windows of each kind of text.
        best_trial: its number among `points`.
        best_fixed: the best of LLM-Pruner's metrics on the first random draw of samples; None if none was tried.
        best_fixed_name: of that metric; empty if none was tried.
        stopped_early: number of trials that were stopped early.
        starting_points: number of points that the space tries before it searches.
        steps: the best trial of each kind, picked on the windows of the search, and its gain over the kind before.
            Kinds whose trials were all stopped are missing. `best` may be another trial.
    """

    points: tuple[TriedPoint, ...]
    ranges: dict[str, tuple[Parameter, ...]]
    importance: dict[str, float]
    trials: int
    best: Candidate
    best_loss: float
    by_kind: dict[str, float] = {}
    best_trial: int
    best_fixed: Candidate | None = None
    best_fixed_loss: float | None = None
    best_fixed_name: str = ""
    stopped_early: int
    starting_points: int
    steps: tuple[Step, ...] = ()

    @property
    def searched(self) -> int:
        """The number of points that the sampler proposed."""
        return sum(not point.starting_point for point in self.points)


@dataclass(frozen=True)
class _Contender:
    """A trial that was not stopped, and its place among the finished ones."""

    trial: FrozenTrial
    number: int
    space: SearchSpace
    kinds: tuple[str, ...]

    @property
    def is_start(self) -> bool:
        return START in self.trial.user_attrs

    @property
    def is_fixed(self) -> bool:
        """True if one of LLM-Pruner's metrics was tried."""
        return FIXED_METRIC in self.trial.user_attrs

    @cached_property
    def candidate(self) -> Candidate:
        return self.space.suggest(self.trial)

    @property
    def losses(self) -> list[float]:
        """On every window; empty if they are not finite."""
        losses: list[float] = self.trial.user_attrs[LOSSES]
        return losses

    @property
    def loss(self) -> float:
        return loss_of(self.trial)

    @property
    def by_kind(self) -> dict[str, float]:
        """The mean loss over the windows of each kind of text."""
        return {
            kind: statistics.fmean(self.losses[place] for place in places)
            for kind, places in places_of(self.kinds[: len(self.losses)]).items()
        }

    @property
    def guarded_loss(self) -> float:
        """The mean loss and that of the worst kind: no kind of text pays for the others."""
        return self.loss + max(self.by_kind.values(), default=self.loss)


def choose(finished: Sequence[FrozenTrial], space: SearchSpace, trials: int, kinds: Sequence[str] = ()) -> SearchResult:
    """The best of the finished trials: by the mean over all windows, and over those of the kind of text that is hit
    most.

    Args:
        finished: in the order in which they were begun.
        trials: number of trials that were to be finished.
        kinds: of the windows; of an unknown kind if empty.
    """
    contenders = [
        _Contender(trial, number, space, tuple(kinds))
        for number, trial in enumerate(finished)
        if STOPPED not in trial.user_attrs
    ]
    contenders.sort(key=attrgetter("loss"))
    fixed = [contender for contender in contenders if contender.is_fixed]
    if not contenders or not math.isfinite(contenders[0].loss):
        raise AdaPrunerError(
            f"none of the {len(finished)} trials has a finite loss: lower `ratio`, or try `dtype` float32"
        )
    best = min(contenders, key=attrgetter("guarded_loss"))
    tried = sorted({name: kind for trial in finished for name, kind in trial.distributions.items()}.items())
    return SearchResult(
        points=tuple(_point(number, trial) for number, trial in enumerate(finished)),
        ranges={name: _ends(kind) for name, kind in tried},
        importance=importance_of(finished),
        trials=trials,
        best=best.candidate,
        best_loss=best.loss,
        by_kind=best.by_kind,
        best_trial=best.number,
        best_fixed=fixed[0].candidate if fixed else None,
        best_fixed_loss=fixed[0].loss if fixed else None,
        best_fixed_name=fixed[0].trial.user_attrs[FIXED_METRIC] if fixed else "",
        stopped_early=len(finished) - len(contenders),
        starting_points=len(space.starting_points()),
        steps=tuple(_steps(contenders)),
    )


def _steps(contenders: Sequence[_Contender]) -> Iterator[Step]:
    """The worth of each part of a search: the best contender of each kind, of contenders sorted by loss."""
    kinds: dict[StepName, list[_Contender]] = {
        "fixed metric": [contender for contender in contenders if contender.is_fixed],
        "starting point": [contender for contender in contenders if contender.is_start and not contender.is_fixed],
        "searched": [contender for contender in contenders if not contender.is_start],
    }
    before: list[float] = []
    for name, (best, *_) in ((name, ranked) for name, ranked in kinds.items() if ranked):
        if not (losses := best.losses):
            continue
        gain, standard_error = compare(before, losses) if before else (None, math.inf)
        yield Step(
            name=name,
            trial=best.number,
            candidate=best.candidate,
            loss=statistics.fmean(losses),
            windows=len(losses),
            gain=gain,
            standard_error=standard_error if math.isfinite(standard_error) else None,
        )
        before = losses


def _point(number: int, trial: FrozenTrial) -> TriedPoint:
    return TriedPoint(
        number=number,
        loss=loss_of(trial) if math.isfinite(loss_of(trial)) else None,
        stopped=STOPPED in trial.user_attrs,
        windows=len(trial.user_attrs[LOSSES]),
        starting_point=START in trial.user_attrs,
        fixed_metric=trial.user_attrs.get(FIXED_METRIC),
        parameters=dict(sorted(trial.params.items())),
        positions={name: _position(trial.params[name], kind) for name, kind in sorted(trial.distributions.items())},
    )


def loss_of(trial: FrozenTrial) -> float:
    """The loss of a finished trial, which may be infinite."""
    return float(trial.values[0])


def compare(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean difference between finite losses and others on the same windows, and its standard error, which is infinite
    for a single window."""
    excess = [loss - other for loss, other in zip(losses, others, strict=True)]
    return statistics.fmean(excess), statistics.stdev(excess) / math.sqrt(len(excess)) if len(excess) > 1 else math.inf


def _position(value: Parameter, kind: BaseDistribution) -> float:
    ends = _ends(kind)
    if isinstance(kind, CategoricalDistribution):
        return ends.index(value) / max(1, len(ends) - 1)
    low, high = map(float, ends)
    return (float(value) - low) / (high - low)


def _ends(kind: BaseDistribution) -> tuple[Parameter, ...]:
    if isinstance(kind, CategoricalDistribution):
        return tuple(kind.choices)  # type: ignore[arg-type]  # ours are of these types
    assert isinstance(kind, FloatDistribution | IntDistribution)
    return kind.low, kind.high


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """While it lasts, Optuna does not log."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def importance_of(finished: Sequence[FrozenTrial]) -> dict[str, float]:
    """Importance of each parameter, from the searched points alone: starting points are given, and a trial without a
    finite loss teaches nothing."""
    searched = [trial for trial in finished if START not in trial.user_attrs and math.isfinite(loss_of(trial))]
    if len(searched) < _FEWEST_POINTS:
        return {}
    with quiet_optuna(), warnings.catch_warnings():
        study = optuna.create_study()
        study.add_trials(searched)
        # Experimental in Optuna 4, whose default evaluator needs scikit-learn.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        # A parameter that few trials have: the report says that it is a hint.
        warnings.filterwarnings("ignore", "Some regimes for parameter", UserWarning)
        return optuna.importance.get_param_importances(study, evaluator=evaluator)
