"""The length of a training: steps, passes, tokens or minutes; and how much of the time validation takes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from adapruner.config import RecoveryOptions
from adapruner.files import write_text

_DEFAULT_EPOCHS = 2
# Times that the validation loss is measured and a checkpoint is saved; in long trainings every 200 steps, as in
# LLM-Pruner.
_VALIDATIONS, _MOST_STEPS_BETWEEN = 5, 200
# All validations together read at most this part of the examples that are trained on, without a backward pass.
_VALIDATED = 0.1
_FEWEST_HELD_OUT = 16
# Prompts of instructions alone have nearly as many tokens.
_FEWEST_TOKENS = 64
# Of a training whose time is given: the steps after which its length is fixed, the first of which is left out; the
# warm-up until then is one of so many steps; and it ends at least so many steps later.
_MEASURED, _FIRST_WARMUP, _FURTHER_WARMUP = 6, 20, 4
# More than any training has, while their number is not known.
UNKNOWN_STEPS = 10**7


def most_examples(options: RecoveryOptions, share: float, is_written: bool) -> int | None:
    """The largest number of examples of a dataset with that share which a training needs, those for validation
    included; None if it needs all, or its length is not known.

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
    if options.minutes is not None:
        few = options.minutes
    elif options.tokens is not None:
        few = _VALIDATED / _VALIDATIONS * int(options.tokens) / options.seq_len
    else:
        seen = examples * epochs(options) if options.steps is None else options.steps * options.batch_size
        few = _VALIDATED * seen / max(_VALIDATIONS, seen / options.batch_size / _MOST_STEPS_BETWEEN)
    return min(options.validation, max(_FEWEST_HELD_OUT, int(few)))


def steps_between_validations(steps: int) -> int:
    """The number of steps between two validations, in a training of so many steps."""
    return max(1, min(_MOST_STEPS_BETWEEN, steps // _VALIDATIONS))


def epochs(options: RecoveryOptions) -> int:
    """The number of passes over all examples, where nothing else gives the length."""
    return options.epochs or _DEFAULT_EPOCHS


class Pace(TrainerCallback):
    """Ends a training after some minutes. The time of the first steps, of the first validation and of a checkpoint
    gives the number of all steps, which is saved: a training that resumes has the same.

    The learning rate rises, falls linearly to 0, and has no jump where the number becomes known.

    Attributes:
        steps: the number of all steps; None if it is not known yet.
    """

    def __init__(self, minutes: float, warmup_steps: int, folder: Path) -> None:
        self._seconds, self._warmup, self._file = 60 * minutes, warmup_steps, folder / "steps.json"
        self.steps: int | None = None
        if self._file.is_file():
            self.steps = int(json.loads(self._file.read_text(encoding="utf-8"))["steps"])
        self._begun = self._validation = self._first = self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        self._begun = time.monotonic()
        rate = lambda step: learning_rate_factor(step, self.steps, self._warmup)  # noqa: E731  # a method is saved
        lr_scheduler.lr_lambdas = [rate] * len(lr_scheduler.lr_lambdas)
        self._tell(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._validation = time.monotonic() - self._begun

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self._first = time.monotonic()
        if state.global_step == _MEASURED and self.steps is None:
            self._last = time.monotonic()
            control.should_save = True  # this is measured too

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.steps is not None or state.global_step != _MEASURED:
            return
        now = time.monotonic()
        step, validation = (self._last - self._first) / (_MEASURED - 1), self._validation + now - self._last
        left = self._begun + self._seconds - now
        few = (left - _VALIDATIONS * validation) / step
        many = left / (step + validation / _MOST_STEPS_BETWEEN)
        [self.steps] = broadcast_object_list([_MEASURED + max(1, int(min(few, many)))])
        if state.is_world_process_zero:
            write_text(self._file, json.dumps({"steps": self.steps}))
        self._tell(state)

    def _tell(self, state: Any) -> None:
        state.max_steps = self.steps or UNKNOWN_STEPS
        state.eval_steps = state.save_steps = steps_between_validations(state.max_steps)


def learning_rate_factor(step: int, steps: int | None, warmup_steps: int) -> float:
    """The learning rate before a step, divided by its peak, in a training whose length becomes known on the way.

    Args:
        steps: the number of all steps; None if it is not known yet.
    """
    first_warmup = min(warmup_steps, _FIRST_WARMUP)
    reached = min(1.0, min(step, _MEASURED) / first_warmup) if first_warmup else 1.0
    if steps is None or step <= _MEASURED:
        return reached
    further = 0 if reached == 1 else max(_FURTHER_WARMUP, min(warmup_steps, steps // 10) - _MEASURED)
    rising = reached + (1 - reached) * (step - _MEASURED) / max(1, further)
    falling = (steps - step) / max(1, steps - _MEASURED - further)
    return max(0.0, min(1.0, rising, falling))
