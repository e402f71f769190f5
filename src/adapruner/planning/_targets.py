"""A budget in another unit than parameters: a target for what the pruned model costs, and the ratio that meets it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapruner.config import TargetName
from adapruner.planning._budget import BudgetError, UnreachableRatioError

TARGET_TOLERANCE = 0.01
# Ratios are tried in these steps, which of 7 billion parameters are fewer than a layer has in 32 channels.
_STEPS, _COARSE_STEPS = 100_000, 1000

# What a model costs of which every block keeps so many groups, in the order of `structure.blocks`: bytes or seconds.
Costs = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Target:
    """The most that the pruned model may cost.

    Attributes:
        option: which option says so, and `value` what it says.
        costs: of a model, by the kept groups of its blocks. They need not be a sum over blocks: in a quantized file the
            type of a matrix depends on its width.
        most: bytes or seconds.
        dense: what the model costs of which nothing is removed.
    """

    option: TargetName
    value: str
    costs: Costs
    most: float
    dense: float

    @property
    def unit(self) -> Literal["MB", "times as fast"]:
        """What `shown` counts in."""
        return "times as fast" if self.option == "target_speed" else "MB"

    def shown(self, cost: float) -> float:
        """A cost in the unit that people read: megabytes, or how many times as fast as the dense model."""
        return self.dense / cost if self.option == "target_speed" else cost / 1e6

    def ratio(self, counts_at: Callable[[float], Sequence[int]], least: float = 0.0) -> float:
        """The lowest ratio that is found at which the cost is within 1 % of the target and not above it.

        Costs fall with the ratio but for steps, so that halving finds it. Where the steps are large, ratios are tried
        one after the other.

        Args:
            counts_at: how many groups every block keeps at a ratio; raises BudgetError where it cannot be met.
            least: what the ratio is more than.

        Raises:
            UnreachableRatioError: the model would cost too much at every ratio.
            BudgetError: it costs no more than that already, or comes no closer to it than 1 %.
        """
        if self.dense <= self.most:
            raise BudgetError(f"{self._asked}: the model has {self._of(self.dense)} already")
        tried: dict[float, float] = {}
        low, high = int(least * _STEPS), _STEPS
        while high - low > 1:
            middle = (low + high) // 2
            cost = self._try(counts_at, middle / _STEPS, tried)
            low, high = (middle, high) if cost > self.most else (low, middle)
        # Not if the cost was too high at every ratio; it is not known between steps.
        if not self._meeting(tried) and not all(cost > self.most for cost in tried.values()):
            for step in range(int(least * _COARSE_STEPS) + 1, _COARSE_STEPS):
                self._try(counts_at, step / _COARSE_STEPS, tried)
        if meeting := self._meeting(tried):
            return min(meeting)
        raise self._refusal(tried)

    def _try(self, counts_at: Callable[[float], Sequence[int]], ratio: float, tried: dict[float, float]) -> float:
        """The cost at a ratio, which is noted; where the ratio cannot be met, what tells in which direction to go."""
        try:
            tried[ratio] = self.costs(counts_at(ratio))
        except UnreachableRatioError:
            return 0.0
        except BudgetError:  # whole experts come in large steps: about what it would be between them
            tried[ratio] = math.nan
            return self.dense * (1 - ratio)
        return tried[ratio]

    def _meeting(self, tried: dict[float, float]) -> list[float]:
        return [ratio for ratio, cost in tried.items() if (1 - TARGET_TOLERANCE) * self.most <= cost <= self.most]

    def _refusal(self, tried: dict[float, float]) -> BudgetError:
        tried = {ratio: cost for ratio, cost in tried.items() if not math.isnan(cost)}
        if not tried:
            return UnreachableRatioError(f"{self._asked} cannot be reached: nothing can be removed from this model")
        ratio = min(tried, key=tried.__getitem__)
        if tried[ratio] > self.most:
            return UnreachableRatioError(
                f"{self._asked} cannot be reached: {self._of(tried[ratio])} at best, with {ratio:.1%} of the parameters"
                f" removed; the dense model has {self._of(self.dense)}"
            )
        nearest = max(cost for cost in tried.values() if cost <= self.most)
        return BudgetError(
            f"{self._asked} is not met within {TARGET_TOLERANCE:.0%}: whole heads, experts and steps of channels come"
            f" to {self._of(nearest)}; lower `round_to`, or choose that"
        )

    @property
    def _asked(self) -> str:
        return f"`{self.option}` {self.value}"

    def _of(self, cost: float) -> str:
        return f"{self.shown(cost):,.2f} {self.unit}"
