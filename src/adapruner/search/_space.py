"""The solution space: which calibration samples, and which mix of importance terms."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

import optuna
import torch

from adapruner.importance import Alignment, MetricPoint, Reduction
from adapruner.measurement import Statistics

Searched = Literal["joint", "calibration", "metric"]

# The fixed factors of the paper (arXiv 2503.06184), and 1, which leaves a term as it is.
_PAPER_SECOND_ORDER_FACTORS = (1.0, 1e5, 1e6, 1e7)
_PAPER_FINE_FACTORS = (1.0, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Candidate:
    """A point of the solution space: a metric and the numbers of the pool samples that it is computed on."""

    point: MetricPoint
    samples: tuple[int, ...]


@dataclass(frozen=True)
class StartingPoint:
    """A point that is tried before the sampler proposes any, and the name of the metric it stands for."""

    name: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class SearchSpace:
    """Turns Optuna parameters into candidates.

    Attributes:
        order: the pool samples, ordered so that neighbours are alike. A parameter is a position in this order.
        samples: how many of them a candidate has.
        alignment: `data` divides terms by their means (or leaves them as they are); `paper` searches its fixed factors.
        searched: hold the samples or the metric at their first draw, or neither.
    """

    order: tuple[int, ...]
    samples: int
    alignment: Literal["data", "paper"] = "data"
    reduction: Reduction = "sum"
    searched: Searched = "joint"

    def suggest(self, trial: optuna.Trial) -> Candidate:
        """Asks the trial for all parameters."""
        return Candidate(self._suggest_point(trial), self._suggest_samples(trial))

    def starting_points(self, seed: int) -> list[StartingPoint]:
        """LLM-Pruner's four metrics on one random draw of samples: the search cannot end worse than they do."""
        draw = random.Random(seed).sample(range(len(self.order)), self.samples)
        positions = {f"sample_{index}": position for index, position in enumerate(sorted(draw))}
        metrics = {
            "vectorize": (0.0, 0.0, 0.0),
            "param_first": (1.0, 0.0, 0.0),
            "param_second": (1.0, 0.0, 1.0),
            "param_mix": (1.0, 0.0, 0.5),
        }
        unaligned: dict[str, Any] = (
            {"alignment": "none"} if self.alignment == "data" else {"second_order_factor": 1.0, "fine_factor": 1.0}
        )
        points = [
            StartingPoint(
                name,
                {"fine": fine, "coarse_second_order": coarse_second, "fine_second_order": fine_second}
                | unaligned
                | positions,
            )
            for name, (fine, coarse_second, fine_second) in metrics.items()
        ]
        return points if self.searched != "calibration" else [points[1]]

    def fixed_parameters(self, seed: int) -> dict[str, Any]:
        """The parameters that are not searched, at their values of the starting points."""
        first = self.starting_points(seed)[0].parameters
        if self.searched == "calibration":
            return {name: value for name, value in first.items() if not name.startswith("sample_")}
        if self.searched == "metric":
            return {name: value for name, value in first.items() if name.startswith("sample_")}
        return {}

    def _suggest_point(self, trial: optuna.Trial) -> MetricPoint:
        """S = α1 (first + λ second) + α2 κ (first + λ second) of the paper. Only the ratio of α1 to α2 and of first to
        second order changes a ranking, so each pair is one number in [0, 1]."""
        fine = trial.suggest_float("fine", 0, 1)
        coarse_second = trial.suggest_float("coarse_second_order", 0, 1)
        fine_second = trial.suggest_float("fine_second_order", 0, 1)
        second_factor = fine_factor = 1.0
        alignment: Alignment = "none"
        if self.alignment == "data":
            alignment = "data" if trial.suggest_categorical("alignment", ("data", "none")) == "data" else "none"
        else:
            second_factor = trial.suggest_categorical("second_order_factor", _PAPER_SECOND_ORDER_FACTORS)
            fine_factor = trial.suggest_categorical("fine_factor", _PAPER_FINE_FACTORS)
        return MetricPoint(
            weights={
                "coarse_first": (1 - fine) * (1 - coarse_second),
                "coarse_second": (1 - fine) * coarse_second * second_factor,
                "fine_first": fine * (1 - fine_second) * fine_factor,
                "fine_second": fine * fine_second * fine_factor * second_factor,
            },
            alignment=alignment,
            reduction=self.reduction,
        )

    def _suggest_samples(self, trial: optuna.Trial) -> tuple[int, ...]:
        """One position per sample; a position already taken stands for the next free one."""
        taken: set[int] = set()
        for index in range(self.samples):
            position = trial.suggest_int(f"sample_{index}", 0, len(self.order) - 1)
            while position in taken:
                position = (position + 1) % len(self.order)
            taken.add(position)
        return tuple(sorted(self.order[position] for position in taken))


def order_by_likeness(statistics: Statistics) -> tuple[int, ...]:
    """Orders the pool so that samples which find the same vectors important are neighbours.

    By the first principal component of the logarithm of the fine first-order term, centred per sample (how much it
    finds important in all) and per vector (what all samples find important).
    """
    importance = statistics.element_absolute.double()
    logarithm = importance.clamp_min(torch.finfo(torch.float32).tiny).log()
    centred = logarithm - logarithm.mean(0) - logarithm.mean(1, keepdim=True) + logarithm.mean()
    # The samples-by-samples product has the same leading direction as the wide matrix, and is small.
    leading = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]
    # An eigenvector has no sign of its own: let the first sample be in the first half.
    leading = leading * (1 if leading[0] <= 0 else -1)
    return tuple(leading.argsort(stable=True).tolist())
