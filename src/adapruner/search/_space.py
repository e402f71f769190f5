"""The solution space: which calibration samples, which mix of importance terms, and where the budget goes."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import optuna
from pydantic import BaseModel, ConfigDict

from adapruner.importance import LLM_PRUNER_METRICS, MetricPoint, Reduction
from adapruner.measurement import Terms
from adapruner.planning import Budget
from adapruner.search._subsets import FEATURES, SubsetFamily

SpaceName = Literal["paper", "extended"]
Searched = Literal["joint", "calibration", "metric"]

# The fixed factors of the paper (arXiv 2503.06184) for second-order against first-order and for fine against coarse.
_PAPER_SECOND_ORDER_FACTORS = (1e5, 1e6, 1e7)
_PAPER_FINE_FACTORS = (1e-2, 1e-3, 1e-4)

# What a trial is given instead of searching it, among its user attributes.
_GIVEN_POINT, _GIVEN_SAMPLES, _GIVEN_BUDGET = "given_point", "given_samples", "given_budget"
FIXED_METRIC = "fixed_metric"

MOST_PROTECTED_FIRST, MOST_PROTECTED_LAST = 6, 4


class Candidate(BaseModel):
    """A point of the solution space: a metric, the numbers of the pool samples that it is computed on, and where the
    budget goes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    point: MetricPoint
    samples: tuple[int, ...]
    budget: Budget


class StartingPoint(BaseModel):
    """What is tried before the sampler proposes anything: searched parameters, and attributes for what is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: dict[str, float | int | str] = {}
    attributes: dict[str, Any] = {}


@dataclass(frozen=True)
class SearchSpace:
    """Turns Optuna parameters into candidates.

    Attributes:
        subsets: the family of calibration subsets.
        samples: how many samples a subset has.
        seed: of the random draw that LLM-Pruner's metrics are tried on.
        budget: what is to go; also where from, as far as that is not searched.
        name: `paper` mixes the Taylor terms; `extended` mixes all terms, and searches the allocation.
        fixed_allocation: fields of the budget that the extended space leaves as they are.
        alignment: `data` divides terms by their means; `paper` searches the fixed factors of the paper.
        terms: `vector-wise` leaves out the terms that are fine.
        searched: `joint`; or only samples or metric, with the first random draw or `param_first` for the other.
    """

    subsets: SubsetFamily
    samples: int
    seed: int
    budget: Budget
    name: SpaceName = "paper"
    fixed_allocation: frozenset[str] = field(default_factory=frozenset)
    alignment: Literal["data", "paper"] = "data"
    reduction: Reduction = "sum"
    terms: Terms = "all"
    searched: Searched = "joint"

    @property
    def first_draw(self) -> list[int]:
        """The random draw of samples that LLM-Pruner's metrics are tried on."""
        return sorted(random.Random(self.seed).sample(range(len(self.subsets.gram)), self.samples))

    def starting_points(self) -> list[StartingPoint]:
        """LLM-Pruner's metrics on a random draw, so that the best of all trials is no worse than they are; then points
        that are good on most models, on the subset that represents the pool."""
        names = list(LLM_PRUNER_METRICS) if self.terms == "all" else ["vectorize"]
        if self.searched == "calibration":
            names = [self._held_metric]
        baselines = [
            StartingPoint(
                attributes={
                    FIXED_METRIC: name,
                    _GIVEN_POINT: LLM_PRUNER_METRICS[name].model_dump(),
                    _GIVEN_SAMPLES: self.first_draw,
                    _GIVEN_BUDGET: asdict(self.budget),
                }
            )
            for name in names
        ]
        untilted: dict[str, Any] = {f"tilt_{feature}": 0.0 for feature in FEATURES} if self._searches_samples else {}
        if self.name == "paper":
            order = "fine_second_order" if self.terms == "all" else "coarse_second_order"
            points: list[dict[str, Any]] = [{"fine": 1.0, order: share} for share in (0.0, 0.5, 1.0)]
        else:
            reference = self._reference_allocation()
            points = [
                _mix(reconstruction=1.0) | reference,
                _mix(reconstruction=1.0) | reference | {"bend": 0.8},
                _mix(reconstruction=1.0, taylor=0.5) | reference | {"bend": 0.8},
                _mix(reconstruction=1.0) | reference | {"bend": 0.4, "heads": "some", "head_share": 0.25},
                _mix(reconstruction=1.0) | reference | {"ranking": "global"},
                _mix(taylor=1.0) | reference,
            ]
        parameters = [untilted | self._searched_only(point) for point in points]
        distinct = [point for number, point in enumerate(parameters) if point not in parameters[:number]]
        return baselines + [StartingPoint(parameters=point, attributes=self.given()) for point in distinct]

    def given(self) -> dict[str, Any]:
        """The attributes of a trial that searches as much as this space searches."""
        given: dict[str, Any] = {}
        if not self._searches_metric:
            given[_GIVEN_POINT] = LLM_PRUNER_METRICS[self._held_metric].model_dump()
        if not self._searches_samples:
            given[_GIVEN_SAMPLES] = self.first_draw
        if not self._searches_allocation:
            given[_GIVEN_BUDGET] = asdict(self.budget)
        return given

    def suggest(self, trial: optuna.trial.BaseTrial) -> Candidate:
        """Asks the trial for all parameters of what it is not given."""
        given = trial.user_attrs
        point, samples, budget = (given.get(name) for name in (_GIVEN_POINT, _GIVEN_SAMPLES, _GIVEN_BUDGET))
        return Candidate(
            point=self._suggest_point(trial) if point is None else MetricPoint.model_validate(point),
            samples=self._suggest_samples(trial) if samples is None else samples,
            budget=self._suggest_budget(trial) if budget is None else Budget(**budget),
        )

    @property
    def _held_metric(self) -> str:
        """LLM-Pruner's metric that is kept where none is searched."""
        return "param_first" if self.terms == "all" else "vectorize"

    @property
    def _searches_metric(self) -> bool:
        return self.searched != "calibration"

    @property
    def _searches_allocation(self) -> bool:
        return self.name == "extended" and self.searched == "joint"

    @property
    def _searches_samples(self) -> bool:
        return self.searched != "metric"

    def _suggest_point(self, trial: optuna.trial.BaseTrial) -> MetricPoint:
        """S = α1 (first + λ second) + α2 κ (first + λ second) of the paper. Only the ratio of α1 to α2 and of first to
        second order changes a ranking, so each pair is one number in [0, 1]. The extended space mixes that with the
        terms of activations and of reconstruction, each pair of which is one number again."""
        has_fine = self.terms == "all"
        fine = trial.suggest_float("fine", 0, 1) if has_fine else 0.0
        coarse_second = trial.suggest_float("coarse_second_order", 0, 1)
        fine_second = trial.suggest_float("fine_second_order", 0, 1) if has_fine else 0.0
        second_factor = fine_factor = 1.0
        if self.alignment == "paper":
            second_factor = trial.suggest_categorical("second_order_factor", _PAPER_SECOND_ORDER_FACTORS)
            if has_fine:
                fine_factor = trial.suggest_categorical("fine_factor", _PAPER_FINE_FACTORS)
        weights = {
            "coarse_first": (1 - fine) * (1 - coarse_second),
            "coarse_second": (1 - fine) * coarse_second * second_factor,
            "fine_first": fine * (1 - fine_second) * fine_factor,
            "fine_second": fine * fine_second * fine_factor * second_factor,
        }
        if self.name == "extended":
            taylor, activation, reconstruction = (trial.suggest_float(name, 0, 1) for name in _TERM_FAMILIES)
            total = taylor + activation + reconstruction or 1.0
            fluctuation = trial.suggest_float("fluctuation", 0, 1)
            elimination = trial.suggest_float("elimination", 0, 1)
            weights = {name: weight * taylor / total for name, weight in weights.items()} | {
                "activation_norm": activation * (1 - fluctuation) / total,
                "fluctuation": activation * fluctuation / total,
                "reconstruction": reconstruction * (1 - elimination) / total,
                "elimination": reconstruction * elimination / total,
            }
            if not any(weights.values()):
                weights["fine_first" if has_fine else "coarse_first"] = 1.0
        return MetricPoint(
            weights=weights, alignment="data" if self.alignment == "data" else "none", reduction=self.reduction
        )

    def _suggest_samples(self, trial: optuna.trial.BaseTrial) -> tuple[int, ...]:
        tilt = {feature: trial.suggest_float(f"tilt_{feature}", -1, 1) for feature in FEATURES}
        return self.subsets.choose(self.samples, tilt)

    def _suggest_budget(self, trial: optuna.trial.BaseTrial) -> Budget:
        changes: dict[str, Any] = {}
        if "head_share" not in self.fixed_allocation:
            some = trial.suggest_categorical("heads", ("none", "some")) == "some"
            changes["head_share"] = trial.suggest_float("head_share", 0.05, 1.0) if some else 0.0
        if self.budget.layout == "per-layer":
            changes["tilt"] = trial.suggest_float("tilt", -0.8, 0.8)
            changes["bend"] = trial.suggest_float("bend", -0.5, 1.5)
            changes["ranking"] = trial.suggest_categorical("ranking", ("local", "global"))
            for name, most in (("protect_first", MOST_PROTECTED_FIRST), ("protect_last", MOST_PROTECTED_LAST)):
                if name not in self.fixed_allocation:
                    changes[name] = trial.suggest_int(name, 0, most)
        return replace(self.budget, **changes)

    def _reference_allocation(self) -> dict[str, Any]:
        """The parameters that give the budget of this space as it is."""
        budget = self.budget
        return {
            "heads": "some" if budget.head_share else "none",
            "head_share": budget.head_share,
            "tilt": budget.tilt,
            "bend": budget.bend,
            "ranking": budget.ranking,
            "protect_first": min(budget.protect_first, MOST_PROTECTED_FIRST),
            "protect_last": min(budget.protect_last, MOST_PROTECTED_LAST),
        }

    def _searched_only(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Without the parameters that this space does not ask for."""
        if not self._searches_metric:
            return {}
        skipped = set(self.fixed_allocation)
        if self.terms != "all":
            skipped |= {"fine", "fine_second_order"}
        if not self._searches_allocation:
            skipped |= {"heads", *_ALLOCATION}
        if "head_share" in skipped:
            skipped.add("heads")
        if parameters.get("heads") == "none":
            skipped.add("head_share")
        if self.budget.layout == "uniform":
            skipped |= set(_ALLOCATION) - {"head_share"}
        return {name: value for name, value in parameters.items() if name not in skipped}


_ALLOCATION = ("head_share", "tilt", "bend", "ranking", "protect_first", "protect_last")
_TERM_FAMILIES = ("taylor", "activation", "reconstruction")


def _mix(**families: float) -> dict[str, float]:
    """Parameters of a mix of the best terms of each family."""
    return {name: families.get(name, 0.0) for name in _TERM_FAMILIES} | {
        "fine": 1.0,
        "fine_second_order": 0.5,
        "fluctuation": 1.0,
        "elimination": 1.0,
    }
