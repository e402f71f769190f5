"""The verdict on a pruned model, from what it can do and what the dense model can."""

from __future__ import annotations

import math
from typing import Literal

from adapruner.evaluation._abilities import Abilities

Verdict = Literal["usable", "recover first", "broken"]

# What must be left of every ability, see `kept_of`.
_LIMITS: dict[Verdict, float] = {"usable": 0.9, "recover first": 0.5}
_SENSITIVITY = 1.0


def kept_of(dense: Abilities, pruned: Abilities) -> dict[str, float]:
    """What is left of every ability."""
    kept = {
        kind: math.exp(-_SENSITIVITY * max(0.0, reading.loss - dense.reads[kind].loss))
        for kind, reading in pruned.reads.items()
    }
    if dense.share_solved and pruned.share_solved is not None:
        kept["built-in tasks"] = pruned.share_solved / dense.share_solved
    return kept


def judge(dense: Abilities, pruned: Abilities) -> Verdict:
    """Judges a pruned model: it can be used as it is, needs training, or has lost too much.

    What it can do is compared with what the dense model can, so that a pruned model is not called broken for a weakness
    of its dense model. What was not measured is not judged.
    """
    kept = kept_of(dense, pruned).values()
    for verdict, limit in _LIMITS.items():
        # A comparison with NaN is false.
        if all(left >= limit for left in kept):
            return verdict
    return "broken"


def damaged(dense: Abilities, pruned: Abilities) -> list[str]:
    """The abilities because of which a model is not usable, with what is left of them, the worst first."""
    kept = kept_of(dense, pruned)
    worst = sorted((left, name) for name, left in kept.items() if not left >= _LIMITS["usable"])
    return [f"{name} ({left:.0%} left)" for left, name in worst]
