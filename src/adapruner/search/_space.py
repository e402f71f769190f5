"""The solution space: which calibration samples, which mix of importance terms, and where the budget is spent."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import optuna
from pydantic import BaseModel, ConfigDict, TypeAdapter

from adapruner.config import Alignment, Reduction, Searched, Space, Terms
from adapruner.importance import LLM_PRUNER_METRICS, PAPER_TERMS, TERMS, MetricPoint, Term, usable_terms
from adapruner.models import Whole
from adapruner.planning import Budget
from adapruner.search._subsets import FEATURES, SubsetFamily

# The fixed factors of the paper (arXiv 2503.06184) for second-order against first-order and for fine against coarse.
_PAPER_SECOND_ORDER_FACTORS = (1e5, 1e6, 1e7)
_PAPER_FINE_FACTORS = (1e-2, 1e-3, 1e-4)

# What a trial is given instead of searching it, among its user attributes; and which of the starting points it is.
_GIVEN_POINT, _GIVEN_SAMPLES, _GIVEN_BUDGET = "given_point", "given_samples", "given_budget"
FIXED_METRIC, START = "fixed_metric", "start"

MOST_PROTECTED_FIRST, MOST_PROTECTED_LAST = 6, 4
# What the share of heads is raised to where channels alone cannot meet the ratio.
_HEAD_SHARES = (0.25, 0.5, 0.75, 1.0)


# What a database gives back is lists.
_BUDGET = TypeAdapter(Budget)


class Candidate(BaseModel):
    """A point of the solution space: a metric, the numbers of the pool samples that it is computed on, and where the
    budget is spent."""

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
    """Turns Optuna parameters into candidates. Those of the extended space are generated from the registered terms: a
    weight for each family, and for each but its first term, the part of the family that it takes.

    Attributes:
        subsets: the family of calibration subsets.
        samples: how many samples a subset has.
        seed: of the random draw that LLM-Pruner's metrics are tried on.
        budget: what is to go; also where from, as far as that is not searched.
        name: `paper` mixes the terms of the paper; `extended` mixes all registered terms, and searches the allocation.
        fixed_allocation: fields of the budget that the extended space leaves as they are.
        alignment: `data` divides terms by their means; `paper` searches the fixed factors of the paper.
        terms: `vector-wise` leaves out the terms that are fine.
        experts: whether there are experts, and what they can be ranked by: also by what was measured of their routing,
            or, where that is not known, by the Taylor terms alone.
        searched: `joint`; or only samples or metric, with the first random draw or `param_first` for the other.
        meet: gives a candidate the ratio that meets the budget or a target; None if its allocation cannot. Then the
            nearest allocation that can is taken: without whole parts removed, with fewer protected layers, then with
            more heads. Without this function, candidates are left as they are.
        whole: for each part of a layer that may be removed whole, the layers in the order of removal. How many are
            removed is searched.
    """

    subsets: SubsetFamily
    samples: int
    seed: int
    budget: Budget
    name: Space = "paper"
    fixed_allocation: frozenset[str] = field(default_factory=frozenset)
    alignment: Alignment = "data"
    reduction: Reduction = "sum"
    terms: Terms = "all"
    searched: Searched = "joint"
    meet: Callable[[Candidate], Candidate | None] | None = None
    experts: Literal["none", "routing", "taylor"] = "none"
    whole: Mapping[Whole, tuple[int, ...]] = field(default_factory=dict)

    @property
    def _terms(self) -> list[Term]:
        return usable_terms(self.name, self.terms, self.experts == "routing")

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
        untilted: dict[str, Any] = {} if self.searched == "metric" else {f"tilt_{one}": 0.0 for one in FEATURES}
        if self.name == "paper":
            order = "fine_second_order" if self.terms == "all" else "coarse_second_order"
            points: list[dict[str, Any]] = [{"fine": 1.0, order: share} for share in (0.0, 0.5, 1.0)]
        else:
            reference = self._reference_allocation()
            # Router weight and output norm alone rank experts worse than how often they are used (docs/experiments.md).
            experts = {} if self.experts == "none" else {"taylor": 1.0}
            routing = {"routing": 0.5} if self.experts == "routing" else {}
            points = [
                _mix(reconstruction=1.0, **experts) | reference,
                _mix(reconstruction=1.0, **experts) | reference | {"bend": 0.8},
                _mix(reconstruction=1.0, taylor=0.5, **routing) | reference | {"bend": 0.8},
                _mix(conditional_variance=1.0, **experts) | reference,
                _mix(reconstruction=0.5, conditional_variance=0.5, **experts) | reference | {"bend": 0.8},
                _mix(reconstruction=1.0, **experts) | reference | {"bend": 0.4, "heads": "some", "head_share": 0.25},
                _mix(reconstruction=1.0, **experts) | reference | {"bend": 0.8, **self._removed(attention=3)},
                _mix(reconstruction=1.0, **experts) | reference | {"bend": 0.8, **self._removed(layer=1)},
            ]
            if self.budget.head_share and "head_share" not in self.fixed_allocation:
                # Where channels alone would not do, this is far better on SmolLM2 (docs/experiments.md).
                points.append(
                    _mix(reconstruction=0.8, conditional_variance=0.2, **experts)
                    | reference
                    | {"heads": "some", "head_share": 0.6, "protect_first": 2, "protect_last": 0}
                    | self._removed(attention=1)
                )
        parameters = [untilted | self._searched_only(point) for point in points]
        distinct = [point for number, point in enumerate(parameters) if point not in parameters[:number]]
        return baselines + [StartingPoint(parameters=point) for point in distinct]

    def _given(self) -> dict[str, Any]:
        """The attributes of a trial that searches as much as this space searches."""
        given: dict[str, Any] = {}
        if self.searched == "calibration":
            given[_GIVEN_POINT] = LLM_PRUNER_METRICS[self._held_metric].model_dump()
        if self.searched == "metric":
            given[_GIVEN_SAMPLES] = self.first_draw
        if self.name == "paper" or self.searched != "joint":
            given[_GIVEN_BUDGET] = asdict(self.budget)
        return given

    def suggest(self, trial: optuna.trial.BaseTrial) -> Candidate:
        """Asks the trial for all parameters of what it is not given."""
        given = self._given() | trial.user_attrs
        point, samples, budget = (given.get(name) for name in (_GIVEN_POINT, _GIVEN_SAMPLES, _GIVEN_BUDGET))
        candidate = Candidate(
            point=self._suggest_point(trial) if point is None else MetricPoint.model_validate(point),
            samples=self._suggest_samples(trial) if samples is None else samples,
            budget=self._suggest_budget(trial) if budget is None else _BUDGET.validate_python(budget),
        )
        return candidate if budget else self._nearest_feasible(candidate)

    @property
    def _held_metric(self) -> str:
        """LLM-Pruner's metric that is kept where none is searched."""
        return "param_first" if self.terms == "all" else "vectorize"

    def _suggest_point(self, trial: optuna.trial.BaseTrial) -> MetricPoint:
        """S = α1 (first + λ second) + α2 κ (first + λ second) of the paper. Only the ratio of α1 to α2 and of first to
        second order changes a ranking, so each pair is one number in [0, 1]. The extended space adds the other
        terms."""
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
            weights = self._suggest_mix(trial, weights)
            if not any(weights.values()):
                weights["fine_first" if has_fine else "coarse_first"] = 1.0
        return MetricPoint(
            weights=weights, alignment="data" if self.alignment == "data" else "none", reduction=self.reduction
        )

    def _suggest_mix(self, trial: optuna.trial.BaseTrial, paper: dict[str, float]) -> dict[str, float]:
        """The weights of all terms, given those of the paper, which are the beginning of the Taylor family."""
        families = _families(self._terms)
        mixes = {family: paper if family == "taylor" else {terms[0].name: 1.0} for family, terms in families.items()}
        shares = {family: trial.suggest_float(family, 0, 1) for family in families}
        for family, terms in families.items():
            for term in _joining(terms):
                part = trial.suggest_float(term.name, 0, 1)
                mixes[family] = {name: weight * (1 - part) for name, weight in mixes[family].items()} | {
                    term.name: part
                }
        total = sum(shares.values()) or 1.0
        return {name: weight * shares[family] / total for family, mix in mixes.items() for name, weight in mix.items()}

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
        gone = {
            whole: layers[: trial.suggest_int(_WHOLE_COUNTS[whole], 0, len(layers))]
            for whole, layers in self.whole.items()
            if layers
        }
        for name, whole in _WITHOUT.items():
            changes[name] = tuple(sorted({*gone.get("layer", ()), *gone.get(whole, ())}))
        return replace(self.budget, **changes)

    def _removed(self, **counts: int) -> dict[str, int]:
        """The parameters that remove so many attentions, feed-forwards or layers, or as many as possible."""
        possible = {whole: len(layers) for whole, layers in self.whole.items() if layers}
        return {_WHOLE_COUNTS[whole]: min(counts.get(whole, 0), most) for whole, most in possible.items()}

    def _nearest_feasible(self, candidate: Candidate) -> Candidate:
        """The candidate itself where no budget near it can be met either."""
        if self.meet is None:
            return candidate
        nearest = (candidate.model_copy(update={"budget": budget}) for budget in self._relaxed(candidate.budget))
        return next(filter(None, map(self.meet, nearest)), candidate)

    def _relaxed(self, budget: Budget) -> Iterator[Budget]:
        """The budget, then without whole parts removed, then ever more to take it from: a layer less protected, at the
        end that protects more, and when none is left, more heads."""
        yield budget
        if budget.without_attention or budget.without_feed_forward:
            budget = replace(budget, without_attention=(), without_feed_forward=())
            yield budget
        while budget.layout == "per-layer":
            protected = {
                name: layers
                for name in ("protect_first", "protect_last")
                if (layers := getattr(budget, name)) and name not in self.fixed_allocation
            }
            if not protected:
                break
            most = max(protected, key=protected.__getitem__)
            budget = replace(budget, **{most: protected[most] - 1})
            yield budget
        if "head_share" not in self.fixed_allocation:
            yield from (replace(budget, head_share=share) for share in _HEAD_SHARES if share > budget.head_share)

    def _reference_allocation(self) -> dict[str, Any]:
        """The parameters that give the budget of this space as it is."""
        return {name: getattr(self.budget, name) for name in _ALLOCATION} | {
            "heads": "some" if self.budget.head_share else "none",
            "protect_first": min(self.budget.protect_first, MOST_PROTECTED_FIRST),
            "protect_last": min(self.budget.protect_last, MOST_PROTECTED_LAST),
            **self._removed(),
        }

    def _searched_only(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Without the parameters that this space does not ask for."""
        given = self._given()
        if _GIVEN_POINT in given:
            return {}
        skipped = set(self.fixed_allocation)
        if self.terms != "all":
            skipped |= {"fine", "fine_second_order"}
        skipped |= {*TERMS, *_families(list(TERMS.values()))} - {*_families(self._terms)}
        skipped -= {term.name for term in self._terms}
        if _GIVEN_BUDGET in given:
            skipped |= {"heads", *_ALLOCATION, *_WHOLE_COUNTS.values()}
        if "head_share" in skipped:
            skipped.add("heads")
        if parameters.get("heads") == "none":
            skipped.add("head_share")
        if self.budget.layout == "uniform":
            skipped |= set(_ALLOCATION) - {"head_share"}
        return {name: value for name, value in parameters.items() if name not in skipped}


# The parameters that count the whole parts removed, and the fields of the budget that list their layers.
_WHOLE_COUNTS: dict[Whole, str] = {
    "attention": "attentions_removed",
    "feed-forward": "feed_forwards_removed",
    "layer": "layers_removed",
}
_WITHOUT: dict[str, Whole] = {"without_attention": "attention", "without_feed_forward": "feed-forward"}
_ALLOCATION = ("head_share", "tilt", "bend", "ranking", "protect_first", "protect_last")


def _families(terms: list[Term]) -> dict[str, list[Term]]:
    """Terms by their family."""
    families: dict[str, list[Term]] = {}
    for term in terms:
        families.setdefault(term.family, []).append(term)
    return families


def _joining(terms: list[Term]) -> list[Term]:
    """The terms of a family that take a part of it: all but those that it begins with."""
    return [term for term in terms[1:] if term.name not in PAPER_TERMS]


def _mix(**shares: float) -> dict[str, float]:
    """Parameters of a mix of families, in each of which the terms take the part that they are registered with."""
    families = _families(list(TERMS.values()))
    mix = {family: shares.get(family, terms[0].share) for family, terms in families.items()}
    parts = {term.name: term.share for terms in families.values() for term in _joining(terms)}
    return mix | {"fine": 1.0, "fine_second_order": 0.5} | parts
