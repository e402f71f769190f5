"""The verdict on a pruned model, from what it can do and what the dense model can."""

from __future__ import annotations

import math
from typing import Literal

from adapruner.evaluation._abilities import Abilities

Verdict = Literal["usable", "recover first", "broken"]

# What must be left of every ability of a usable model, and of each by which a model is broken.
_USABLE, _NOT_BROKEN = 0.9, 0.6
# A rise of the loss by r nats per token leaves about exp(-c r) of an ability: of code, as HumanEval shows it, because
# programs must be right to the last token; of the others, as readers see it (research/experiments/verdict.md).
_LOST_PER_NAT, _LOST_PER_NAT_OF_CODE = 0.5, 9.0
# A model that solves fewer of the built-in programs cannot program, and has nothing to lose.
_CAN_PROGRAM = 0.5


def kept_of(dense: Abilities, pruned: Abilities) -> dict[str, float]:
    """What is left of every ability, as an estimate; of the built-in tasks, the share of the solved items."""
    programs = dense.solved.get("programs", "0")
    can_program = programs.count("1") >= _CAN_PROGRAM * len(programs)
    kept = {
        kind: _left(dense, pruned, kind, _LOST_PER_NAT_OF_CODE if kind == "code" and can_program else _LOST_PER_NAT)
        for kind in dense.reads
    }
    if dense.share_solved and pruned.share_solved is not None:
        kept["built-in tasks"] = pruned.share_solved / dense.share_solved
    return kept


def judge(dense: Abilities, pruned: Abilities) -> Verdict:
    """Judges a pruned model: it can be used as it is, needs training, or has lost too much.

    What it can do is compared with what the dense model can, so that a pruned model is not called broken for a weakness
    of its dense model. What was not measured is not judged.
    """
    kept = kept_of(dense, pruned)
    # A comparison with NaN is false.
    if all(left >= _USABLE for left in kept.values()):
        return "usable"
    # Who cannot program any more may still be repaired.
    if "code" in kept:
        kept["code"] = _left(dense, pruned, "code", _LOST_PER_NAT)
    return "recover first" if all(left >= _NOT_BROKEN for left in kept.values()) else "broken"


def damaged(dense: Abilities, pruned: Abilities) -> list[str]:
    """The abilities because of which a model is not usable, with what is left of them, the worst first."""
    kept = kept_of(dense, pruned)
    worst = sorted((left, name) for name, left in kept.items() if not left >= _USABLE)
    return [f"{name} ({left:.0%} left)" for left, name in worst]


def _left(dense: Abilities, pruned: Abilities, kind: str, lost_per_nat: float) -> float:
    rise = pruned.reads[kind].loss - dense.reads[kind].loss
    return 1.0 if rise <= 0 else math.exp(-lost_per_nat * rise)
