"""The verdict on a pruned model, from its distance to the dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Literal, NamedTuple

from adapruner.evaluation._breakage import Breakage

# The built-in texts that limits were drawn on: what damage shows in first, and the language itself.
_FORMAL, _LANGUAGE = ("arithmetic", "code"), ("prose", "dialogue", "instructions")

Verdict = Literal["usable", "recover first", "broken"]


class _Limits(NamedTuple):
    """The most that a model may differ from the dense model.

    Attributes:
        formal: the bits per byte of arithmetic and code, as a multiple of the dense model's; geometric mean.
        language: those of prose, dialogue and instructions.
        repetition: the rise of the repetition.
        loss: the rise, in nats per token, of the dense model's loss on sampled continuations above that on its own.
    """

    formal: float
    language: float
    repetition: float
    loss: float

    def hold(self, dense: Breakage, pruned: Breakage) -> bool:
        # A comparison with NaN is false.
        return (
            _rise(_FORMAL, dense, pruned) <= self.formal
            and _rise(_LANGUAGE, dense, pruned) <= self.language
            and (pruned.repetition or 0.0) - (dense.repetition or 0.0) <= self.repetition
            and (pruned.loss_of_dense or 0.0) - (dense.loss_of_dense or 0.0) <= self.loss
        )


def _rise(kinds: Sequence[str], dense: Breakage, pruned: Breakage) -> float:
    """The bits per byte of some texts as a multiple of the dense model's, geometric mean; 1 if they are not known."""
    rises = [
        number.bits_per_byte / before
        for text, number in pruned.texts.items()
        if text in kinds and number.bits_per_byte is not None and (before := dense.texts[text].bits_per_byte)
    ]
    return geometric_mean(rises) if rises else 1.0


# Between models that read as one class and as the next: research/experiments/verdict.md. A broken model may repeat
# itself or babble, so repetition does not tell one; and one that learnt something else than the dense model knows may
# be usable, so agreement with it tells nothing.
_USABLE = _Limits(formal=1.28, language=1.1, repetition=0.1, loss=0.3)
_NOT_BROKEN = _Limits(formal=1.8, language=1.21, repetition=1.0, loss=math.inf)


def judge(dense: Breakage, pruned: Breakage) -> Verdict:
    """Judges a pruned model: it can be used as it is, needs fine-tuning, or has lost the language.

    All signs are compared with those of the dense model, so that a pruned model is not called broken for a weakness of
    its dense model. Signs that were not measured are not judged.
    """
    if _USABLE.hold(dense, pruned):
        return "usable"
    return "recover first" if _NOT_BROKEN.hold(dense, pruned) else "broken"
