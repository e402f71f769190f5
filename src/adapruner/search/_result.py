"""The outcome of a search: its trials, of which the best are judged further, and one is chosen."""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from operator import attrgetter
from typing import Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial
from pydantic import BaseModel
from torch import Tensor

from adapruner.calibration._text import places_of
from adapruner.errors import AdaPrunerError
from adapruner.search._space import FIXED_METRIC, START, Candidate, SearchSpace

Judge = Callable[[Candidate], Iterable[Tensor]]

# User attributes of a trial: that it was stopped early, and the losses of the windows that it was judged on.
STOPPED, LOSSES = "stopped", "losses"
# Number of best trials that are judged further, in addition to the best fixed metric and the best starting point.
_FINALISTS = 3
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
        windows: number of windows that the steps are compared on.
        is_held_out: True if these are further windows; False if they are the windows of the search, on which the trials
            of the steps were picked: there the best of many looks better than it is.
        gain: the loss of the step before minus this loss, in nats per predicted token; None for the first.
        standard_error: of the gain, from the differences window by window; None if there is only one window.
    """

    name: StepName
    trial: int
    candidate: Candidate
    loss: float
    windows: int
    is_held_out: bool
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
        best: the best of the candidates that were not stopped; where finalists were judged further, the best of those.
        best_loss: on the windows on which it was last judged; so is `best_fixed_loss`.
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
    """A trial that was not stopped, and its place among the finished ones. Its candidate is judged on further windows
    when those losses are first read."""

    trial: FrozenTrial
    number: int
    space: SearchSpace
    judge_further: Judge | None
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

    @cached_property
    def further(self) -> list[float]:
        """The loss on each further window."""
        batches = (
            self.judge_further(self.candidate) if self.judge_further and math.isfinite(loss_of(self.trial)) else []
        )
        return [loss for batch in batches for loss in batch.tolist()]

    @property
    def final_loss(self) -> float:
        """The mean loss over the windows of the search and the further ones together."""
        return statistics.fmean([*self.trial.user_attrs[LOSSES], *self.further] or [math.inf])

    @property
    def by_kind(self) -> dict[str, float]:
        """The mean loss over these windows of each kind of text."""
        losses = [*self.trial.user_attrs[LOSSES], *self.further]
        return {
            kind: statistics.fmean(losses[place] for place in places)
            for kind, places in places_of(self.kinds[: len(losses)]).items()
        }

    @property
    def guarded_loss(self) -> float:
        """The mean loss and that of the worst kind: no kind of text pays for the others."""
        return self.final_loss + max(self.by_kind.values(), default=self.final_loss)


def choose(
    finished: Sequence[FrozenTrial],
    space: SearchSpace,
    trials: int,
    judge_further: Judge | None = None,
    kinds: Sequence[str] = (),
) -> SearchResult:
    """The best of the finished trials, judged on further windows: by the mean over all windows, and over those of the
    kind of text that is hit most.

    Args:
        finished: in the order in which they were begun.
        trials: number of trials that were to be finished.
        judge_further: gives the losses of a candidate, batch by batch, as the judge of the search does, but on further
            windows. The best of many trials owes part of its loss to the windows it was chosen on; None accepts that.
        kinds: of the windows of the search and the further ones; of an unknown kind if empty.
    """
    contenders = [
        _Contender(trial, number, space, judge_further, tuple(kinds))
        for number, trial in enumerate(finished)
        if STOPPED not in trial.user_attrs
    ]
    contenders.sort(key=lambda contender: loss_of(contender.trial))
    fixed = [contender for contender in contenders if contender.is_fixed]
    starts = [contender for contender in contenders if contender.is_start]
    if not contenders or not math.isfinite(loss_of(contenders[0].trial)):
        raise AdaPrunerError(
            f"none of the {len(finished)} trials has a finite loss: lower `ratio`, or try `dtype` float32"
        )
    first = islice(_distinct(contenders), _FINALISTS if judge_further else 1)
    # The best fixed metric is judged further to compare with, and so is the best starting point.
    best = min(_distinct([*fixed[:1], *starts[:1], *first]), key=attrgetter("guarded_loss"))
    tried = sorted({name: kind for trial in finished for name, kind in trial.distributions.items()}.items())
    return SearchResult(
        points=tuple(_point(number, trial) for number, trial in enumerate(finished)),
        ranges={name: _ends(kind) for name, kind in tried},
        importance=importance_of(finished),
        trials=trials,
        best=best.candidate,
        best_loss=best.final_loss,
        by_kind=best.by_kind,
        best_trial=best.number,
        best_fixed=fixed[0].candidate if fixed else None,
        best_fixed_loss=fixed[0].final_loss if fixed else None,
        best_fixed_name=fixed[0].trial.user_attrs[FIXED_METRIC] if fixed else "",
        stopped_early=len(finished) - len(contenders),
        starting_points=len(space.starting_points()),
        steps=tuple(_steps(contenders)),
    )


def _distinct(contenders: Iterable[_Contender]) -> Iterator[_Contender]:
    """The contenders whose candidates differ from those before."""
    seen: set[str] = set()
    for contender in contenders:
        if (name := contender.candidate.model_dump_json()) not in seen:
            seen.add(name)
            yield contender


def _steps(contenders: Sequence[_Contender]) -> Iterator[Step]:
    """The worth of each part of a search: the best contender of each kind, of contenders sorted by loss."""
    kinds: dict[StepName, list[_Contender]] = {
        "fixed metric": [contender for contender in contenders if contender.is_fixed],
        "starting point": [contender for contender in contenders if contender.is_start and not contender.is_fixed],
        "searched": [contender for contender in contenders if not contender.is_start],
    }
    before: list[float] = []
    for name, (best, *_) in ((name, ranked) for name, ranked in kinds.items() if ranked):
        losses = best.further or best.trial.user_attrs[LOSSES]
        if not losses or not all(map(math.isfinite, losses)):
            continue
        gain, standard_error = compare(before, losses) if before else (None, math.inf)
        yield Step(
            name=name,
            trial=best.number,
            candidate=best.candidate,
            loss=statistics.fmean(losses),
            windows=len(losses),
            is_held_out=bool(best.further),
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
