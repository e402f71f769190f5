"""The length of a training: steps, passes or tokens; and how much of the time validation takes."""

from __future__ import annotations

import math

from adapruner.config import RecoveryOptions

# Passes over all examples, where nothing else gives the length.
DEFAULT_EPOCHS = 2
# Times that the validation loss is measured and a checkpoint is saved; in long trainings every 200 steps, as in
# LLM-Pruner.
_VALIDATIONS, _MOST_STEPS_BETWEEN = 5, 200
# All validations together read at most this part of the examples that are trained on, without a backward pass.
_VALIDATED = 0.1
_FEWEST_HELD_OUT = 16
# Prompts of instructions alone have nearly as many tokens.
_FEWEST_TOKENS = 64


def most_examples(options: RecoveryOptions, share: float, is_written: bool) -> int | None:
    """The largest number of examples of a dataset with that share which a training needs, those for validation
    included; None if it needs all.

    Args:
        is_written: True if the teacher writes them, which costs more than reading too many.
    """
    if options.steps is not None:
        seen = float(options.steps * options.batch_size)
    elif options.tokens is not None:
        seen = int(options.tokens) / (options.seq_len if is_written else min(_FEWEST_TOKENS, options.seq_len))
    else:
        return None
    # Shares are met up to one example, and at least two are needed.
    return math.ceil((seen + most_held_out(options, seen)) * share) + 2


def most_held_out(options: RecoveryOptions, examples: float) -> int:
    """The largest number of examples for validation.

    Args:
        examples: the number of all examples; if the training has a length, that decides.
    """
    if options.tokens is not None:
        few = _VALIDATED / _VALIDATIONS * int(options.tokens) / options.seq_len
    else:
        seen = (
            examples * (options.epochs or DEFAULT_EPOCHS)
            if options.steps is None
            else options.steps * options.batch_size
        )
        few = _VALIDATED * seen / max(_VALIDATIONS, seen / options.batch_size / _MOST_STEPS_BETWEEN)
    return min(options.validation, max(_FEWEST_HELD_OUT, int(few)))


def steps_between_validations(steps: int) -> int:
    """The number of steps between two validations, in a training of so many steps."""
    return max(1, min(_MOST_STEPS_BETWEEN, steps // _VALIDATIONS))
