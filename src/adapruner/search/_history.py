"""The finished trials of a search."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial
from pydantic import BaseModel
from typing_extensions import Self

from adapruner.search._space import FIXED_METRIC, START, Candidate
from adapruner.search._study_file import quiet_optuna

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
        loss: mean over the windows, or the expected mean if the trial was stopped early; None if it is not finite.
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


class History(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """The finished trials of a search.

    Attributes:
        points: in the order in which they were begun.
        ranges: both ends of the range of every parameter, or its choices.
        importance: the share of each parameter in the difference between the best trials and the others (PED-ANOVA,
            Watanabe et al., arXiv 2304.10255), largest first; empty if there are too few trials.
    """

    points: tuple[TriedPoint, ...] = ()
    ranges: dict[str, tuple[Parameter, ...]] = {}
    importance: dict[str, float] = {}

    @property
    def searched(self) -> int:
        """The number of points that the sampler proposed."""
        return sum(not point.starting_point for point in self.points)

    @classmethod
    def of(cls, finished: Sequence[FrozenTrial], **further: object) -> Self:
        """The history of finished trials in the order in which they were begun, with further fields of a subclass."""
        kinds = sorted({name: kind for trial in finished for name, kind in trial.distributions.items()}.items())
        fields = {
            "points": tuple(point_of(number, trial) for number, trial in enumerate(finished)),
            "ranges": {name: _ends(kind) for name, kind in kinds},
            "importance": importance_of(finished),
        }
        return cls.model_validate(fields | further)


def point_of(number: int, trial: FrozenTrial) -> TriedPoint:
    """A finished trial.

    Args:
        number: its place among the finished trials.
    """
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
