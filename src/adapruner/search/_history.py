"""What a search has tried, read beside it: nothing is written."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from adapruner.search._shared import StudyPlace
from adapruner.search._space import FIXED_METRIC
from adapruner.search._study import STOPPED

# Searched points below which nothing is said of the importance of parameters.
_FEWEST_POINTS = 20

Parameter = float | int | str


@dataclass(frozen=True)
class TriedPoint:
    """A finished trial.

    Attributes:
        loss: mean over the windows, or what it is likely to be where the trial was stopped early; None where its budget
            cannot be met or the model is broken.
        fixed_metric: the name of the LLM-Pruner metric that it is, if it is one.
        parameters: what was searched, by name.
        positions: the same within their ranges, 0 to 1.
    """

    number: int
    loss: float | None
    stopped: bool
    fixed_metric: str | None
    parameters: dict[str, Parameter]
    positions: dict[str, float]


@dataclass(frozen=True)
class History:
    """The trials of a search so far.

    Attributes:
        points: in the order in which they were begun.
        ranges: the ends of the range of every parameter, or its choices.
        importance: the share of each parameter in what sets the best trials apart, largest first (PED-ANOVA, Watanabe
            et al., arXiv 2304.10255); empty where there are too few trials.
        elsewhere: the database that holds the trials, of which then nothing else is known here.
    """

    points: tuple[TriedPoint, ...] = ()
    ranges: dict[str, tuple[Parameter, ...]] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)
    elsewhere: str | None = None


def read_history(place: StudyPlace) -> History:
    """Reads the trials from the journal of a run."""
    if not place.record.is_file():
        return History()
    record = json.loads(place.record.read_text())
    if record["place"] != StudyPlace(place.folder).described:
        return History(elsewhere=record["place"])
    if not place.journal.is_file():
        return History()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(place.journal)))
    try:
        study = optuna.load_study(study_name=record["name"], storage=storage)
    except KeyError:  # named, but nothing has been tried yet
        return History()
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    distributions = {name: kind for trial in finished for name, kind in trial.distributions.items()}
    return History(
        points=tuple(map(_point, finished)),
        ranges={name: _ends(kind) for name, kind in distributions.items()},
        importance=importance_of(finished),
    )


def _point(trial: FrozenTrial) -> TriedPoint:
    return TriedPoint(
        number=trial.number,
        loss=trial.values[0] if math.isfinite(trial.values[0]) else None,
        stopped=STOPPED in trial.user_attrs,
        fixed_metric=trial.user_attrs.get(FIXED_METRIC),
        parameters=trial.params,
        positions={name: _position(trial.params[name], kind) for name, kind in trial.distributions.items()},
    )


def _position(value: Parameter, kind: BaseDistribution) -> float:
    ends = _ends(kind)
    if isinstance(kind, CategoricalDistribution):
        return ends.index(value) / max(1, len(ends) - 1)
    low, high = map(float, ends)
    return (float(value) - low) / (high - low)


def _ends(kind: BaseDistribution) -> tuple[Parameter, ...]:
    if isinstance(kind, CategoricalDistribution):
        return tuple(kind.choices)  # type: ignore[arg-type]
    assert isinstance(kind, FloatDistribution | IntDistribution)
    return kind.low, kind.high


def importance_of(finished: list[FrozenTrial]) -> dict[str, float]:
    """Of the searched points alone: a fixed metric has no parameters, and a trial without a loss teaches nothing."""
    searched = [trial for trial in finished if trial.params and math.isfinite(trial.values[0])]
    if len(searched) < _FEWEST_POINTS:
        return {}
    study = optuna.create_study()
    study.add_trials(searched)
    with warnings.catch_warnings():
        # Called experimental in Optuna 4, whose default needs scikit-learn.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        # A parameter that few trials have: the report says that it is a hint.
        warnings.filterwarnings("ignore", "Some regimes for parameter", UserWarning)
        return optuna.importance.get_param_importances(study, evaluator=evaluator)
