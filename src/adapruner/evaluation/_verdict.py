"""The verdict on a pruned model, from its distance to the dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Literal

from adapruner.evaluation._breakage import Breakage

Verdict = Literal["usable", "recover first", "broken"]

# The built-in texts that limits were drawn on: what damage shows in first, and the language itself.
_FORMAL, _LANGUAGE = ("arithmetic", "code"), ("prose", "dialogue", "instructions")
# The most that a model may differ from the dense model: the bits per byte of arithmetic and code, and those of prose,
# dialogue and instructions, as multiples of the dense model's (geometric means); the rise of the repetition; and the
# rise, in nats per token, of the dense model's loss on sampled continuations above that on its own. The limits lie
# between models that read as one class and as the next: research/experiments/verdict.md. A broken model may repeat
# itself or babble, so repetition does not tell one; and one that learnt something else than the dense model knows may
# be usable, so agreement with it tells nothing.
_LIMITS: dict[Verdict, tuple[float, float, float, float]] = {
    "usable": (1.28, 1.1, 0.1, 0.3),
    "recover first": (1.8, 1.21, 1.0, math.inf),
}


def judge(dense: Breakage, pruned: Breakage) -> Verdict:
    """Judges a pruned model: it can be used as it is, needs fine-tuning, or has lost the language.

    All signs are compared with those of the dense model, so that a pruned model is not called broken for a weakness of
    its dense model. Signs that were not measured are not judged.
    """
    differences = (
        _rise(_FORMAL, dense, pruned),
        _rise(_LANGUAGE, dense, pruned),
        (pruned.repetition or 0.0) - (dense.repetition or 0.0),
        (pruned.loss_of_dense or 0.0) - (dense.loss_of_dense or 0.0),
    )
    for verdict, limits in _LIMITS.items():
        # A comparison with NaN is false.
        if all(difference <= limit for difference, limit in zip(differences, limits, strict=True)):
            return verdict
    return "broken"


def _rise(kinds: Sequence[str], dense: Breakage, pruned: Breakage) -> float:
    """The bits per byte of some texts as a multiple of the dense model's, geometric mean; 1 if they are not known."""
    rises = [
        number.bits_per_byte / before
        for text, number in pruned.texts.items()
        if text in kinds and number.bits_per_byte is not None and (before := dense.texts[text].bits_per_byte)
    ]
    return geometric_mean(rises) if rises else 1.0
