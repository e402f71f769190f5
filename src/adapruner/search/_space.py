"""The solution space: which calibration samples, and which mix of importance terms."""

from __future__ import annotations

import random
from typing import Any, Literal

import optuna
from pydantic import BaseModel, ConfigDict

from adapruner.importance import LLM_PRUNER_METRICS, MetricPoint, Reduction
from adapruner.search._subsets import FEATURES, SubsetFamily

Searched = Literal["joint", "calibration", "metric"]

# The fixed factors of the paper (arXiv 2503.06184) for second-order against first-order and for fine against coarse.
_PAPER_SECOND_ORDER_FACTORS = (1e5, 1e6, 1e7)
_PAPER_FINE_FACTORS = (1e-2, 1e-3, 1e-4)

# What a trial is given instead of searching it, among its user attributes.
_GIVEN_POINT, _GIVEN_SAMPLES = "given_point", "given_samples"
FIXED_METRIC = "fixed_metric"


class Candidate(BaseModel):
    """A point of the solution space: a metric and the numbers of the pool samples that it is computed on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    point: MetricPoint
    samples: tuple[int, ...]


class StartingPoint(BaseModel):
    """What is tried before the sampler proposes anything: searched parameters, and attributes for what is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: dict[str, float] = {}
    attributes: dict[str, Any] = {}


class SearchSpace:
    """Turns Optuna parameters into candidates."""

    def __init__(
        self,
        subsets: SubsetFamily,
        samples: int,
        seed: int,
        alignment: Literal["data", "paper"] = "data",
        reduction: Reduction = "sum",
        searched: Searched = "joint",
    ) -> None:
        """
        Args:
            subsets: the family of calibration subsets.
            samples: how many samples a subset has.
            seed: of the random draw that LLM-Pruner's metrics are tried on.
            alignment: `data` divides terms by their means; `paper` searches the fixed factors of the paper.
            searched: `joint`; or only one of both, with the first random draw or `param_first` for the other.
        """
        self.subsets, self.samples = subsets, samples
        self.alignment, self.reduction, self.searched = alignment, reduction, searched
        self.first_draw = sorted(random.Random(seed).sample(range(len(subsets.gram)), samples))

    def starting_points(self) -> list[StartingPoint]:
        """LLM-Pruner's metrics on a random draw, so that the best of all trials is no worse than they are; then the
        subset that represents the pool, with element-wise terms. Where the metric is not searched, `param_first`."""
        names = ["param_first"] if self.searched == "calibration" else list(LLM_PRUNER_METRICS)
        baselines = [
            StartingPoint(
                attributes={
                    FIXED_METRIC: name,
                    _GIVEN_POINT: LLM_PRUNER_METRICS[name].model_dump(),
                    _GIVEN_SAMPLES: self.first_draw,
                }
            )
            for name in names
        ]
        untilted = {f"tilt_{feature}": 0.0 for feature in FEATURES} if self.searched != "metric" else {}
        shares = (0.0, 0.5, 1.0) if self.searched != "calibration" else (None,)
        representative = [
            StartingPoint(
                parameters=untilted | ({} if share is None else {"fine": 1.0, "fine_second_order": share}),
                attributes=self.given(),
            )
            for share in shares
        ]
        return baselines + representative

    def given(self) -> dict[str, Any]:
        """The attributes of a trial that searches as much as this space searches."""
        if self.searched == "calibration":
            return {_GIVEN_POINT: LLM_PRUNER_METRICS["param_first"].model_dump()}
        if self.searched == "metric":
            return {_GIVEN_SAMPLES: self.first_draw}
        return {}

    def suggest(self, trial: optuna.trial.BaseTrial) -> Candidate:
        """Asks the trial for all parameters of what it is not given."""
        given = trial.user_attrs
        point = given.get(_GIVEN_POINT)
        samples = given.get(_GIVEN_SAMPLES)
        return Candidate(
            point=self._suggest_point(trial) if point is None else MetricPoint.model_validate(point),
            samples=self._suggest_samples(trial) if samples is None else samples,
        )

    def _suggest_point(self, trial: optuna.trial.BaseTrial) -> MetricPoint:
        """S = α1 (first + λ second) + α2 κ (first + λ second) of the paper. Only the ratio of α1 to α2 and of first to
        second order changes a ranking, so each pair is one number in [0, 1]."""
        fine = trial.suggest_float("fine", 0, 1)
        coarse_second = trial.suggest_float("coarse_second_order", 0, 1)
        fine_second = trial.suggest_float("fine_second_order", 0, 1)
        second_factor = fine_factor = 1.0
        if self.alignment == "paper":
            second_factor = trial.suggest_categorical("second_order_factor", _PAPER_SECOND_ORDER_FACTORS)
            fine_factor = trial.suggest_categorical("fine_factor", _PAPER_FINE_FACTORS)
        return MetricPoint(
            weights={
                "coarse_first": (1 - fine) * (1 - coarse_second),
                "coarse_second": (1 - fine) * coarse_second * second_factor,
                "fine_first": fine * (1 - fine_second) * fine_factor,
                "fine_second": fine * fine_second * fine_factor * second_factor,
            },
            alignment="data" if self.alignment == "data" else "none",
            reduction=self.reduction,
        )

    def _suggest_samples(self, trial: optuna.trial.BaseTrial) -> tuple[int, ...]:
        tilt = {feature: trial.suggest_float(f"tilt_{feature}", -1, 1) for feature in FEATURES}
        return self.subsets.choose(self.samples, tilt)
