"""Targets for the cost of the pruned model, instead of a ratio of the parameters, and the ratio that meets it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, TypeAlias

from pydantic import BaseModel

from adapruner.config import Phase, TargetFormat, TargetName
from adapruner.option_values import size_in_bytes
from adapruner.planning._budget import BudgetError, UnreachableRatioError

TARGET_TOLERANCE = 0.01
# Ratios are tried in steps of 1 / _STEPS: fewer parameters of a 7B model than a layer has in 32 channels.
_STEPS, _COARSE_STEPS = 100_000, 1000
# Tokens of a sequence unless `target_context` is given: in the cache, and of a prompt that is timed.
_CACHED_TOKENS, TIMED_TOKENS = 2048, 128

# Cost of a model in bytes or seconds, given the number of groups that each block keeps, in the order of
# `structure.blocks`.
Costs: TypeAlias = Callable[[Sequence[int]], float]
Unit: TypeAlias = Literal["MB", "times as fast"]


@dataclass(frozen=True)
class Size:
    """A maximum size of the file, as 400MB or 1.5GiB."""

    option: ClassVar[TargetName] = "target_size"
    asked: str
    format: TargetFormat = "auto"


@dataclass(frozen=True)
class Memory:
    """A maximum memory of the weights, and of the cache after `context` tokens of `batch` sequences."""

    option: ClassVar[TargetName] = "target_memory"
    asked: str
    format: TargetFormat = "auto"
    batch: int = 1
    context: int = _CACHED_TOKENS


@dataclass(frozen=True)
class Speed:
    """A minimum speed-up over the dense model, with `batch` sequences of `context` tokens."""

    option: ClassVar[TargetName] = "target_speed"
    asked: float
    phase: Phase = "prefill"
    batch: int = 1
    context: int = TIMED_TOKENS


Amount: TypeAlias = Size | Memory | Speed


def requested_amount(
    target_size: str | None,
    target_memory: str | None,
    target_speed: float | None,
    target_format: TargetFormat,
    target_phase: Phase,
    target_batch: int,
    target_context: int | None,
) -> Amount | None:
    """The amount that the options of these names ask for instead of a ratio; None if no target is given."""
    if target_size is not None:
        return Size(target_size, target_format)
    if target_memory is not None:
        return Memory(target_memory, target_format, target_batch, target_context or _CACHED_TOKENS)
    if target_speed is not None:
        return Speed(target_speed, target_phase, target_batch, target_context or TIMED_TOKENS)
    return None


class TargetOutcome(BaseModel, extra="forbid", frozen=True):
    """A target, and how well it was met.

    Attributes:
        unit: of all numbers.
        dense: the cost of the dense model, with the tokens that are kept.
        asked: the value of the option.
        predicted: computed for the plan.
        reached: by the saved model: its size, or its speed, measured in turn with the dense model.
    """

    option: TargetName
    unit: Unit
    dense: float
    asked: float
    predicted: float
    reached: float


@dataclass(frozen=True)
class Target:
    """The largest cost that the pruned model may have.

    Attributes:
        amount: the requested amount.
        costs: the cost of a model, by the kept groups of its blocks. It need not be a sum over blocks: in a quantized
            file, the type of a matrix depends on its width.
        dense: bytes or seconds of the unpruned model.
    """

    amount: Amount
    costs: Costs
    dense: float

    @cached_property
    def most(self) -> float:
        """The largest cost that meets the target, in bytes or seconds."""
        if isinstance(self.amount, Speed):
            return self.dense / self.amount.asked
        return float(size_in_bytes(self.amount.asked))

    @property
    def unit(self) -> Unit:
        """The unit of what `shown` returns."""
        return "times as fast" if isinstance(self.amount, Speed) else "MB"

    def shown(self, cost: float) -> float:
        """A cost as it is shown: in megabytes, or as speed-up over the dense model."""
        return self.dense / cost if isinstance(self.amount, Speed) else cost / 1e6

    def outcome(self, counts: Sequence[int], reached: float) -> TargetOutcome:
        """The target compared with a saved model.

        Args:
            counts: number of groups that each block keeps.
            reached: bytes or seconds of the saved model.
        """
        costs = {"dense": self.dense, "asked": self.most, "predicted": self.costs(counts), "reached": reached}
        numbers = {name: self.shown(cost) for name, cost in costs.items()}
        return TargetOutcome(option=self.amount.option, unit=self.unit, **numbers)

    def ratio(self, counts_at: Callable[[float], Sequence[int]], least: float = 0.0) -> float:
        """The lowest ratio found at which the cost is within 1 % of the target and not above it.

        Costs fall with the ratio except for steps, so bisection finds it. If the steps are large, ratios are tried one
        after the other.

        Args:
            counts_at: gives the number of groups that every block keeps at a ratio; raises BudgetError if the ratio
                cannot be met.
            least: the ratio is larger than this.

        Raises:
            UnreachableRatioError: the model would cost too much at every ratio.
            BudgetError: it costs no more than that already, or comes no closer to it than 1 %.
        """
        if self.dense <= self.most:
            raise BudgetError(f"{self._asked}: the model has {self._described(self.dense)} already")
        tried: dict[float, float] = {}

        def cost_at(ratio: float) -> float:
            """The cost, which is noted; if the ratio cannot be met, a number that gives the direction of the search."""
            try:
                tried[ratio] = self.costs(counts_at(ratio))
            except UnreachableRatioError:
                return 0.0
            except BudgetError:  # whole experts come in large steps: interpolated
                tried[ratio] = math.nan
                return self.dense * (1 - ratio)
            return tried[ratio]

        def meeting() -> list[float]:
            return [ratio for ratio, cost in tried.items() if (1 - TARGET_TOLERANCE) * self.most <= cost <= self.most]

        low, high = int(least * _STEPS), _STEPS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost_at(middle / _STEPS) > self.most else (low, middle)
        # Unless the cost was too high at every ratio: between the steps it is unknown.
        if not meeting() and not all(cost > self.most for cost in tried.values()):
            for step in range(int(least * _COARSE_STEPS) + 1, _COARSE_STEPS):
                cost_at(step / _COARSE_STEPS)
        if not meeting():
            raise self._refusal(tried)
        return min(meeting())

    def _refusal(self, tried: dict[float, float]) -> BudgetError:
        tried = {ratio: cost for ratio, cost in tried.items() if not math.isnan(cost)}
        if not tried:
            return UnreachableRatioError(f"{self._asked} cannot be reached: nothing can be removed from this model")
        ratio = min(tried, key=tried.__getitem__)
        if tried[ratio] > self.most:
            return UnreachableRatioError(
                f"{self._asked} cannot be reached: {self._described(tried[ratio])} at best, with {ratio:.1%} of the"
                f" parameters removed; the dense model has {self._described(self.dense)}"
            )
        nearest = max(cost for cost in tried.values() if cost <= self.most)
        return BudgetError(
            f"{self._asked} is not met within {TARGET_TOLERANCE:.0%}: whole heads, experts and steps of channels come"
            f" to {self._described(nearest)}; choose that, or lower `round_to` if it is above 1"
        )

    @property
    def _asked(self) -> str:
        return f"`{self.amount.option}` {self.amount.asked}"

    def _described(self, cost: float) -> str:
        return f"{self.shown(cost):,.2f} {self.unit}"
