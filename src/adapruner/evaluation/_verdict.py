"""The verdict on a pruned model, from its distance to the dense model."""

from __future__ import annotations

import math
from statistics import geometric_mean
from typing import Literal, NamedTuple

from adapruner.evaluation._breakage import Breakage

# The built-in texts that the limits were drawn on.
_JUDGED = ("arithmetic", "code")

Verdict = Literal["usable", "recover first", "broken"]


class _Limits(NamedTuple):
    """The limits that a model must keep to.

    Attributes:
        agreement: the least agreement.
        bits: the most bits per byte, as a multiple of the dense model's; geometric mean over arithmetic and code.
        repetition: the largest rise above the dense model's repetition.
        loss: the largest rise, in nats per token, of the dense model's loss on sampled continuations above that on its
            own.
    """

    agreement: float
    bits: float
    repetition: float
    loss: float

    def hold(self, dense: Breakage, pruned: Breakage) -> bool:
        rises = [
            number.bits_per_byte / before
            for text, number in pruned.texts.items()
            if text in _JUDGED and number.bits_per_byte is not None and (before := dense.texts[text].bits_per_byte)
        ]
        # A comparison with NaN is false.
        return (
            (pruned.agreement is None or pruned.agreement >= self.agreement)
            and (not rises or geometric_mean(rises) <= self.bits)
            and (pruned.repetition or 0.0) - (dense.repetition or 0.0) <= self.repetition
            and (pruned.loss_of_dense or 0.0) - (dense.loss_of_dense or 0.0) <= self.loss
        )


# Between models that clearly belong to one class and to the next: research/experiments/verdict.md. A broken
# model may repeat itself or babble, so repetition does not tell one.
# A model that learnt something else than the dense model knows may be usable.
_USABLE = _Limits(agreement=0.0, bits=1.28, repetition=0.25, loss=0.3)
_NOT_BROKEN = _Limits(agreement=0.49, bits=1.8, repetition=1.0, loss=math.inf)


def judge(dense: Breakage, pruned: Breakage) -> Verdict:
    """Judges a pruned model: it can be used as it is, needs fine-tuning, or has lost the language.

    All signs are compared with those of the dense model, so that a pruned model is not called broken for a weakness of
    its dense model. Signs that were not measured are not judged.
    """
    if _USABLE.hold(dense, pruned):
        return "usable"
    return "recover first" if _NOT_BROKEN.hold(dense, pruned) else "broken"
