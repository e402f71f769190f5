"""Healing: a cut model is trained to predict as the dense model does, at a learning rate that is found on it."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.base.errors import AdaPrunerError, NonFiniteError, reason
from adapruner.base.files import write_text
from adapruner.options import RecoveryOptions, TrainedWeights
from adapruner.text.windows import Text, joined
from adapruner.train.examples import Example, Examples, examples_of_windows
from adapruner.train.training import RecoveryRecord, train, try_training

# The record of healing, in the folder of the model.
HEALING = "healing.json"
# Learning rates that are tried, from the lowest until one is worse, and the share of all steps that each trial takes
# (research/experiments/healing.md); the rate grows from zero, so that a single step would change nothing.
_RATES: dict[TrainedWeights, tuple[float, ...]] = {
    "layers": (5e-6, 3e-5, 1.5e-4),
    "lora": (3e-5, 1e-4, 5e-4),
    "ia3": (3e-4, 1e-3, 3e-3),
}
_TRIED, _FEWEST_STEPS = 0.1, 3
# Of many weights, few tokens give a gradient that is mostly noise.
_TOKENS_PER_STEP: dict[TrainedWeights, int] = {"layers": 2048, "lora": 1024, "ia3": 512}
_TOKENS_AT_ONCE = 512
# Tokens of a window: with longer ones the gain is the same at every position, and there are as many steps as with
# short ones (research/experiments/healing.md). There are at least so many windows.
_LONGEST, _FEWEST_WINDOWS = 512, 8
# By 25,000 and 60,000 tokens of natural text, all weights bring more than scales on two models, and less on one, at
# whose rates they hardly move (research/experiments/healing.md).
TOKENS_FOR_ALL_WEIGHTS = 200_000
_LORA_RANK = 32


class Healing(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """The record of healing.

    Attributes:
        trained: the weights that were trained.
        losses_by_rate: the divergence from the dense model on held-out windows, over a `VocabularySample`, after a
            tenth of the steps at each learning rate, in nats per token; after all, if those made the model worse.
        loss_before: the same before the first step.
        record: of the training at the best of these rates; None if none of them brought the model nearer to the dense
            one, or the training did not: the weights are as they were.
    """

    trained: TrainedWeights
    losses_by_rate: dict[float, float]
    loss_before: float
    record: RecoveryRecord | None = None

    @property
    def reason(self) -> str:
        """Why the weights were left as they were."""
        tried = ", ".join(f"{loss:.4f} at a rate of {rate:g}" for rate, loss in self.losses_by_rate.items())
        return (
            f"after training, the divergence from the dense model, which was {self.loss_before:.4f} nats per token, is"
            f" {tried}"
        )


def length_of_windows(seq_len: int, windows: int, positions: int | None) -> int:
    """Tokens of the windows that are trained on, which are put together from the calibration text.

    Args:
        seq_len, windows: of that text.
        positions: of the model, if they have an end.
    """
    return max(seq_len, min(_LONGEST, seq_len * windows // _FEWEST_WINDOWS, positions or _LONGEST))


def healing_options(
    weights: TrainedWeights, tokens: int, seq_len: int, seed: int, device: torch.device, layer_wise: bool
) -> RecoveryOptions:
    """The options of healing.

    Args:
        weights: what is trained.
        tokens: to train on.
        seq_len: tokens of an example.
        device: of the model. On an accelerator, memory is short and gradient checkpointing is on.
        layer_wise: the layers of both models are streamed, which recomputes activations as gradient checkpointing does.
    """
    batch_size = max(1, _TOKENS_PER_STEP[weights] // seq_len)
    return RecoveryOptions(
        train=weights,
        steps=max(1, round(tokens / (batch_size * seq_len))),
        seq_len=seq_len,
        batch_size=batch_size,
        micro_batch_size=min(batch_size, max(1, _TOKENS_AT_ONCE // seq_len)),
        gradient_checkpointing=device.type != "cpu" and not layer_wise,
        warmup_steps=20,
        lora_rank=_LORA_RANK,
        lora_alpha=2 * _LORA_RANK,
        lora_dropout=0.0,
        label_weight=0.0,
        seed=seed,
    )


def reading_at_most(times: int, text: Text, options: RecoveryOptions) -> tuple[RecoveryOptions, str]:
    """The options with no more steps than read a text so often, and what is left out."""
    of_step, tokens = options.batch_size * options.seq_len, text.windows.numel()
    steps = max(1, times * tokens // of_step)
    if (options.steps or 0) <= steps:
        return options, ""
    return options.model_copy(update={"steps": steps}), (
        f"The training after the cut reads its {tokens:,} tokens of text {times} times, and ends before the"
        f" {(options.steps or 0) * of_step:,} of `heal`: more text of `calibration` makes it longer"
    )


def heal(
    load: Callable[[], PreTrainedModel],
    text: Text,
    held_out: Text,
    teacher: PreTrainedModel,
    options: RecoveryOptions,
    folder: Path,
    progress: Callable[[int], None] = lambda steps: None,
    start: Tensor | None = None,
) -> tuple[PreTrainedModel | None, Healing]:
    """Trains a model to predict as another one does. A tenth of the steps at each of several learning rates is tried
    first, from the lowest until one is worse; then the model is trained at the best of them, from the beginning.

    Args:
        load: gives the model to train.
        text: to train on.
        held_out: text of the same kinds, on which the learning rate is chosen and the result judged.
        teacher: the dense model.
        folder: for the checkpoints of a training that resumes.
        progress: called with the number of steps done, those of the trials included; see `steps_of_healing`.
        start: [special tokens], int64, with which the tokenizer begins a text; none by default.

    Returns:
        The trained model and the record; None if it comes no nearer to the dense model.
    """

    def as_text(windows: Tensor) -> list[Example]:
        special = torch.empty(0, dtype=torch.int64) if start is None else start
        return examples_of_windows(joined(windows, special, options.seq_len), label_weight=0.0)

    # The windows of every kind that has held-out ones, in their shares.
    by_kind, validation, tried = text.by_kind, held_out.by_kind, folder / "rates.json"
    count = sum(len(by_kind[kind]) for kind in validation)
    blend = [
        Examples(kind, as_text(by_kind[kind]), as_text(own), len(by_kind[kind]) / count)
        for kind, own in validation.items()
    ]
    if tried.is_file():
        record = Healing.model_validate_json(tried.read_bytes())
        progress(steps_of_healing(options) - (options.steps or 0))
    else:
        record = _try_rates(load, blend, teacher, options, folder, progress)
        write_text(tried, record.model_dump_json())
    best = min(record.losses_by_rate, key=record.losses_by_rate.__getitem__)
    if not record.losses_by_rate[best] < record.loss_before:
        return None, record
    settings = options.model_copy(update={"learning_rate": best})
    model, of_training = train(load, blend, settings, folder, teacher, progress, record.loss_before)
    if not of_training.loss_after < of_training.loss_before:
        losses = record.losses_by_rate | {best: of_training.loss_after}
        return None, record.model_copy(update={"losses_by_rate": losses})
    return model, record.model_copy(update={"record": of_training})


def _try_rates(
    load: Callable[[], PreTrainedModel],
    blend: Sequence[Examples],
    teacher: PreTrainedModel,
    options: RecoveryOptions,
    folder: Path,
    progress: Callable[[int], None],
) -> Healing:
    """The losses after a tenth of the steps at each rate, up to the first that is worse than the one before. The lowest
    changes little: chance may make it worse than nothing."""
    losses, before, least = dict[float, float](), None, math.inf
    for rate in _RATES[options.train]:
        settings = options.model_copy(update={"steps": _steps_of_a_trial(options), "learning_rate": rate})
        try:
            before, losses[rate] = try_training(load, blend, settings, folder / "trial", teacher, progress, before)
        except NonFiniteError:
            losses[rate] = math.inf
        if losses[rate] > least:
            break
        least = losses[rate]
    progress((len(_RATES[options.train]) - len(losses)) * _steps_of_a_trial(options))
    return Healing(trained=options.train, losses_by_rate=losses, loss_before=math.inf if before is None else before)


def read_healing(model: Path) -> Healing | None:
    """The record of healing in the folder of a model; None if there is none."""
    path = model / HEALING
    try:
        return Healing.model_validate_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValidationError) as error:
        raise AdaPrunerError(f"{path} is not the record of a training after a cut ({reason(error)})") from None


def steps_of_healing(options: RecoveryOptions) -> int:
    """The number of steps, those of the trials included."""
    return (options.steps or 0) + len(_RATES[options.train]) * _steps_of_a_trial(options)


def _steps_of_a_trial(options: RecoveryOptions) -> int:
    return max(_FEWEST_STEPS, round(_TRIED * (options.steps or 0)))
