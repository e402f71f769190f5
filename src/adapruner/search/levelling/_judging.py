"""A candidate with its losses, and by how much another one is better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict
from typing_extensions import Self

from adapruner.search._objective import Objective
from adapruner.search._space import Candidate

# Of several changes that are tried, one gains by chance: what is tried one by one must gain so many standard errors.
CERTAIN = 2.0

# Gives a candidate the ratio that meets the budget or a target; None if its allocation cannot.
Meet: TypeAlias = Callable[[Candidate], "Candidate | None"]


@dataclass(frozen=True)
class Judged:
    """A candidate and its loss on each window of the objective, in nats per predicted token."""

    candidate: Candidate
    losses: list[float]


class Tried(BaseModel):
    """What a change gains.

    Attributes:
        gain: by how much the loss on the windows of the objective fell, in nats per predicted token.
        gain_standard_error: from the differences window by window; None where there is but one.
        accepted: whether the gain is more than so many standard errors as this kind of change needs, and the change was
            made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gain: float
    gain_standard_error: float | None
    accepted: bool

    @classmethod
    def compared(cls, before: Judged, after: Judged, certain: float, /, **fields: Any) -> Self:
        """Accepted for a gain of more than so many standard errors."""
        gains = [one - other for one, other in zip(before.losses, after.losses, strict=True)]
        gain = statistics.fmean(gains)
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
        accepted = gain > certain * (error or 0.0)
        return cls(gain=gain, gain_standard_error=error, accepted=accepted, **fields)


def judge(objective: Objective, candidate: Candidate | None) -> Judged | None:
    """None for no candidate, and where a loss is not finite."""
    if not candidate:
        return None
    losses = [loss for batch in objective(candidate) for loss in batch.tolist()]
    return Judged(candidate, losses) if all(map(math.isfinite, losses)) else None
