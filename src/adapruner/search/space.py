"""The solution space: calibration samples and a mix of importance terms."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from optuna.trial import BaseTrial
from pydantic import BaseModel
from torch import Tensor

from adapruner.importance import LLM_PRUNER_METRICS, PAPER_TERMS, TERMS, MetricPoint, Term, usable_terms
from adapruner.measurement.taylor import Statistics
from adapruner.options import Alignment, Reduction, Searched
from adapruner.structure.blocks import Structure

# The fixed factors of the paper (arXiv 2503.06184) for second-order against first-order and for fine against coarse.
_PAPER_SECOND_ORDER_FACTORS = (1e5, 1e6, 1e7)
_PAPER_FINE_FACTORS = (1e-2, 1e-3, 1e-4)

# Features of a sample, by which subsets are tilted.
FEATURES = ("loss", "gradient", "first_component", "second_component")

# User attributes of a trial: the name of LLM-Pruner's metric that it tries instead of a searched point, and its number
# among the starting points.
FIXED_METRIC, START = "fixed_metric", "start"


class Candidate(BaseModel, extra="forbid", frozen=True):
    """A point of the solution space: a metric, and the numbers of the pool samples that it is computed on."""

    point: MetricPoint
    samples: tuple[int, ...]


@dataclass(frozen=True)
class SubsetFamily:
    """Subsets of the pool that represent it, tilted towards some of its samples.

    Every sample weighs exp(Σ_f tilt_f feature_f). A subset is herded: the samples are taken one by one so that the mean
    importance over the subset comes as near as it can to the weighted mean over the pool (kernel herding, Chen, Welling
    and Smola, arXiv 1203.3472). Without a tilt, this is the subset that represents the whole pool best. A small tilt
    changes few samples, so that neighbouring points are similar, which they are not in a search over single samples.

    Attributes:
        gram: [samples, samples], float64, products between the importances that the samples give to all vectors.
        features: [samples, features], float64, standardised: the loss, the size of the gradient, and the position along
            the two directions in which the samples' importances differ most.
    """

    gram: Tensor
    features: Tensor

    def choose(self, count: int, tilt: Mapping[str, float]) -> tuple[int, ...]:
        """The numbers of `count` samples, ascending; the tilt of a feature that is not named is 0."""
        tilts = torch.tensor([tilt.get(feature, 0.0) for feature in FEATURES], dtype=self.gram.dtype)
        to_target = self.gram @ torch.softmax(self.features @ tilts, 0)
        squares, to_chosen = self.gram.diagonal(), torch.zeros_like(to_target)
        chosen: list[int] = []
        squared_sum = target_sum = torch.zeros((), dtype=self.gram.dtype)
        for size in range(1, count + 1):
            # |mean over the subset - target|², up to a constant, if each sample were added next.
            distance = (squared_sum + 2 * to_chosen + squares) / size**2 - 2 * (target_sum + to_target) / size
            distance[chosen] = torch.inf
            best = int(distance.argmin())
            squared_sum = squared_sum + 2 * to_chosen[best] + squares[best]
            target_sum = target_sum + to_target[best]
            to_chosen = to_chosen + self.gram[best]
            chosen.append(best)
        return tuple(sorted(chosen))


def build_subset_family(statistics: Statistics, structure: Structure, counts: Sequence[int]) -> SubsetFamily:
    """Compares the samples of a pool by the first-order importance, element by element, that they give to the removable
    groups. Blocks that are kept whole by these counts of groups are left out."""
    pruned = torch.tensor(
        [count < block.groups for block, count in zip(structure.blocks, counts, strict=True)], dtype=torch.bool
    )
    vectors = pruned[structure.block_of_vector]
    importance = statistics.element_absolute[:, vectors]
    blocks = structure.block_of_vector[vectors].expand_as(importance)
    means = torch.zeros(len(importance), len(structure.blocks)).scatter_reduce_(
        1, blocks, importance, "mean", include_self=False
    )
    # Blocks differ in scale by orders of magnitude; each shall count the same.
    aligned = importance / means.mean(0).clamp_min(torch.finfo(torch.float32).tiny)[blocks[0]]
    logarithm = aligned.clamp_min(torch.finfo(torch.float32).tiny).log()
    centred = logarithm - logarithm.mean(0) - logarithm.mean(1, keepdim=True) + logarithm.mean()
    # The samples-by-samples product has the same leading directions as the wide matrix, and is small.
    vectors = torch.linalg.eigh((centred @ centred.T).double()).eigenvectors
    leading = vectors[:, -1], vectors[:, -min(2, len(vectors))]
    # A definite sign.
    components = (vector * vector[vector.abs().argmax()].sign() for vector in leading)
    features = [statistics.loss, aligned.mean(1).log(), *components]
    return SubsetFamily(
        gram=(aligned @ aligned.T).double(), features=torch.stack([_standardise(values) for values in features], 1)
    )


def _standardise(values: Tensor) -> Tensor:
    centred = values.double() - values.double().mean()
    return centred / centred.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)


class StartingPoint(BaseModel, extra="forbid", frozen=True):
    """A point that is tried before the sampler proposes any: searched parameters, or the name of a fixed metric."""

    parameters: dict[str, float | int | str] = {}
    attributes: dict[str, object] = {}


class _KnownTrial:
    """A trial that suggests known values and notes the names of the parameters."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values, self.names = values, set[str]()

    def suggest_float(self, name: str, low: float, high: float, /) -> float:
        return float(self._value(name, low))

    def suggest_categorical(self, name: str, choices: Sequence[Any], /) -> Any:
        return self._value(name, choices[0])

    def _value(self, name: str, default: Any) -> Any:
        self.names.add(name)
        return self._values.get(name, default)


Parameters: TypeAlias = BaseTrial | _KnownTrial


# LLM-Pruner's metric that is used if no metric is searched.
_HELD_METRIC = "param_first"


@dataclass(frozen=True)
class SearchSpace(ABC):
    """Turns Optuna parameters into candidates. The name of a parameter begins with its group, as in `metric.fine`, so
    that terms and families may have any name.

    Attributes:
        subsets: the family of calibration subsets.
        samples: number of samples in a subset.
        seed: of the random draw that LLM-Pruner's metrics are tried on.
        reduction: reduces the vectors of a group to one score.
        searched: `joint`; or only samples or metric, with the first random draw or `param_first` for the other.
    """

    subsets: SubsetFamily
    samples: int
    seed: int
    reduction: Reduction = "sum"
    searched: Searched = "joint"

    @property
    def first_draw(self) -> list[int]:
        """The random draw of samples that LLM-Pruner's metrics are tried on."""
        return sorted(random.Random(self.seed).sample(range(len(self.subsets.gram)), self.samples))

    def starting_points(self) -> list[StartingPoint]:
        """Points that are good on most models, the best first, on the subset that represents the pool, and LLM-Pruner's
        metrics on a random draw."""
        metrics = [_HELD_METRIC] if self.searched == "calibration" else list(LLM_PRUNER_METRICS)
        untilted = {f"samples.tilt_{feature}": 0.0 for feature in FEATURES}
        parameters = []
        for point in self._good_points():
            known = _KnownTrial(untilted | point)
            self._ask(known)  # notes what is searched
            parameters.append({name: value for name, value in (untilted | point).items() if name in known.names})
        distinct = [point for number, point in enumerate(parameters) if point not in parameters[:number]]
        return [
            *(StartingPoint(parameters=point) for point in distinct),
            *(StartingPoint(attributes={FIXED_METRIC: name}) for name in metrics),
        ]

    def suggest(self, trial: BaseTrial) -> Candidate:
        """The candidate of the parameters that the trial suggests, or of its fixed metric."""
        if metric := trial.user_attrs.get(FIXED_METRIC):
            point = LLM_PRUNER_METRICS[metric]
            return Candidate(point=point, samples=tuple(self.first_draw))
        return self._ask(trial)

    def _ask(self, trial: Parameters) -> Candidate:
        holds_metric = self.searched == "calibration"
        point = LLM_PRUNER_METRICS[_HELD_METRIC] if holds_metric else self._ask_for_metric(trial)
        samples = tuple(self.first_draw)
        if self.searched != "metric":
            tilt = {feature: trial.suggest_float(f"samples.tilt_{feature}", -1, 1) for feature in FEATURES}
            samples = self.subsets.choose(self.samples, tilt)
        return Candidate(point=point, samples=samples)

    @abstractmethod
    def _good_points(self) -> list[dict[str, Any]]:
        """Parameters of points that are good on most models; may include parameters that are not searched."""

    @abstractmethod
    def _ask_for_metric(self, trial: Parameters) -> MetricPoint: ...

    def _taylor_weights(
        self, trial: Parameters, second_orders: Sequence[float] = (), fines: Sequence[float] = ()
    ) -> dict[str, float]:
        """S = α1 (first + λ second) + α2 κ (first + λ second) of the paper. Only the ratio of α1 to α2 and of first to
        second order changes a ranking, so each pair is one number in [0, 1]. λ is one of `second_orders` and κ one of
        `fines`; 1 if there are none."""
        fine = trial.suggest_float("metric.fine", 0, 1)
        coarse_second = trial.suggest_float("metric.coarse_second_order", 0, 1)
        fine_second = trial.suggest_float("metric.fine_second_order", 0, 1)
        second_factor = trial.suggest_categorical("metric.second_order_factor", second_orders) if second_orders else 1.0
        fine_factor = trial.suggest_categorical("metric.fine_factor", fines) if fines else 1.0
        return {
            "coarse_first": (1 - fine) * (1 - coarse_second),
            "coarse_second": (1 - fine) * coarse_second * second_factor,
            "fine_first": fine * (1 - fine_second) * fine_factor,
            "fine_second": fine * fine_second * fine_factor * second_factor,
        }


@dataclass(frozen=True)
class PaperSpace(SearchSpace):
    """The space of the paper: its four terms, divided by their means (`alignment` `data`) or multiplied by its fixed
    factors, which are then searched (`paper`)."""

    alignment: Alignment = "data"

    def _good_points(self) -> list[dict[str, object]]:
        return [{"metric.fine": 1.0, "metric.fine_second_order": share} for share in (0.0, 0.5, 1.0)]

    def _ask_for_metric(self, trial: Parameters) -> MetricPoint:
        if self.alignment == "data":
            return MetricPoint(weights=self._taylor_weights(trial), reduction=self.reduction)
        weights = self._taylor_weights(trial, _PAPER_SECOND_ORDER_FACTORS, _PAPER_FINE_FACTORS)
        return MetricPoint(weights=weights, alignment="none", reduction=self.reduction)


@dataclass(frozen=True)
class ExtendedSpace(SearchSpace):
    """All registered terms. Each family of terms has a weight. Each term of a family but the first has a share of the
    family.

    Attributes:
        experts: `none` without experts; `routing` if routing was measured, by which experts can be ranked as well; or
            `taylor` if they can be ranked by the Taylor terms alone.
    """

    experts: Literal["none", "routing", "taylor"] = "none"

    def _good_points(self) -> list[dict[str, Any]]:
        # Router weight and output norm alone rank experts worse than how often they are used
        # (research/experiments/experts.md).
        experts = {} if self.experts == "none" else {"taylor": 1.0}
        routing = {"routing": 0.5} if self.experts == "routing" else {}
        return [
            _mix(reconstruction=1.0, **experts),
            _mix(reconstruction=1.0, **experts) | {"term.tempered_elimination": 0.0},
            _mix(reconstruction=1.0, taylor=0.5, **routing),
            _mix(conditional_variance=1.0, **experts),
            _mix(reconstruction=0.5, conditional_variance=0.5, **experts),
        ]

    def _ask_for_metric(self, trial: Parameters) -> MetricPoint:
        paper = self._taylor_weights(trial)
        families = _families(usable_terms("extended", self.experts == "routing"))
        mixes = {family: paper if family == "taylor" else {terms[0].name: 1.0} for family, terms in families.items()}
        shares = {family: trial.suggest_float(f"family.{family}", 0, 1) for family in families}
        for family, terms in families.items():
            for term in _joining(terms):
                share = trial.suggest_float(f"term.{term.name}", 0, 1)
                others = {name: weight * (1 - share) for name, weight in mixes[family].items()}
                mixes[family] = others | {term.name: share}
        total = sum(shares.values()) or 1.0
        weights = {
            name: weight * shares[family] / total for family, mix in mixes.items() for name, weight in mix.items()
        }
        if not any(weights.values()):
            weights["fine_first"] = 1.0
        return MetricPoint(weights=weights, reduction=self.reduction)


def _families(terms: list[Term]) -> dict[str, list[Term]]:
    """Terms by their family."""
    families: dict[str, list[Term]] = {}
    for term in terms:
        families.setdefault(term.family, []).append(term)
    return families


def _joining(terms: list[Term]) -> list[Term]:
    """The terms that have a share of their family: all but its first terms."""
    return [term for term in terms[1:] if term.name not in PAPER_TERMS]


def _mix(**shares: float) -> dict[str, float]:
    """Parameters of a mix of families; the terms of each have the share that they are registered with."""
    families = _families(list(TERMS.values()))
    mix = {f"family.{family}": shares.get(family, terms[0].share) for family, terms in families.items()}
    parts = {f"term.{term.name}": term.share for terms in families.values() for term in _joining(terms)}
    return mix | {"metric.fine": 1.0, "metric.fine_second_order": 0.5} | parts
