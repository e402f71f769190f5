"""Training through the Trainer of transformers: LoRA (arXiv 2106.09685), IA3 (arXiv 2205.05638) or all weights, on
labels or on a teacher."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from adapruner.config import RecoveryOptions
from adapruner.errors import AdaPrunerError, NonFiniteError
from adapruner.models import computes_bfloat16_natively, quiet_transformers
from adapruner.models.modeling_pruned import Nothing
from adapruner.processes import this_process
from adapruner.progress import give_back_memory
from adapruner.random_state import random_state_kept
from adapruner.recovery._adapters import frozen, merge, take_off, with_adapters
from adapruner.recovery._examples import IGNORED, Example, Examples
from adapruner.recovery._sharding import gather, refuse_other_sharding, set_up_fsdp
from adapruner.recovery._trainers import TokenTrainer

# Times that the validation loss is measured and a checkpoint is saved; in long trainings every 200 steps, as in
# LLM-Pruner.
_VALIDATIONS, _MOST_STEPS_BETWEEN = 10, 200
# The environment variables that select the visible accelerators.
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}


class RecoveryRecord(BaseModel):
    """The outcome of a recovery: the content of `recovery.json`.

    Attributes:
        config: all options, and in `recovery.json` the model and the data.
        skipped_records: records that were left out because their answer is empty or beyond the cut-off.
        steps: steps of the optimizer.
        tokens: tokens of all examples that were read, prompts included.
        loss_before: validation loss before the first step, in nats per token; for distillation, the weighted sum of
            this and the divergence from the teacher.
        loss_after: the least validation loss, which is that of the kept weights.
        best_step: the step with that loss.
        seconds: of training, in the last call.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    config: dict[str, Any]
    method: Literal["labels", "distillation"]
    training_examples: int
    validation_examples: int
    skipped_records: int
    steps: int
    tokens: int
    loss_before: float
    loss_after: float
    best_step: int
    seconds: float


def train(
    load: Callable[[], PreTrainedModel],
    examples: Examples,
    options: RecoveryOptions,
    folder: Path,
    teacher: PreTrainedModel | None = None,
    progress: Callable[[int], None] | None = None,
    track: Callable[[Mapping[str, float]], None] = lambda values: None,
) -> tuple[PreTrainedModel, RecoveryRecord]:
    """Trains a model; a call that was killed resumes from its last saved step. Processes that were started together
    share every batch. The random state of the program is left as it was.

    The frozen weights below adapters, of LoRA or IA3, are held in bfloat16 if the hardware computes that natively, and
    the adapters are merged into the original weights, in their dtype. Without adapters, all weights are trained in
    float32, with bfloat16 products if those are native. Nothing is trained in float16.

    Args:
        load: gives the model, whose weights change. Called a second time, to merge adapters, if they are trained on a
            copy: the two are never in memory together, unless they are held elsewhere.
        folder: for the Trainer's checkpoints.
        teacher: learn its predictions (see `Objective`) and not the labels alone; it is run in its own dtype.
        progress: called with the number of steps done.
        track: called with the numbers that the Trainer logs: the losses and the learning rate of every step.

    Returns:
        The model in evaluation mode, and the record. With FSDP, the first process alone has all weights.

    Raises:
        NonFiniteError: the loss is not finite any more; earlier checkpoints are kept.
    """
    model, state = _trained(load, examples, options, folder, teacher, _Watcher(progress, folder, track))
    # The Trainer is part of reference cycles that hold the teacher and the trained copy.
    gc.collect()
    return model, _record(state, examples, options, "distillation" if teacher else "labels")


def _trained(
    load: Callable[[], PreTrainedModel],
    examples: Examples,
    options: RecoveryOptions,
    folder: Path,
    teacher: PreTrainedModel | None,
    watcher: TrainerCallback,
) -> tuple[PreTrainedModel, TrainerState]:
    """The model after training all of its weights, or adapters that are merged into them; and the Trainer's state."""
    model = load()
    dtype = model.dtype
    if options.train == "full":
        cast(nn.Module, model).float()
    else:
        model = frozen(model)
    with random_state_kept(), quiet_transformers(), warnings.catch_warnings():
        # PEFT, the Trainer and PyTorch warn about intended settings, and about each other.
        warnings.simplefilter("ignore")
        set_seed(options.seed)
        trained: Any = model if options.train == "full" else with_adapters(model, options)
        last = _last_whole_checkpoint(folder)
        trainer = TokenTrainer(
            model,
            teacher,
            options,
            model=trained,
            args=_arguments(model, options, folder, total_steps(examples, options), evaluates_first=last is None),
            train_dataset=examples.training,
            eval_dataset=examples.validation,
            data_collator=_batch,
            callbacks=[watcher],
        )
        trainer.remove_callback(PrinterCallback)
        if last:
            refuse_other_sharding(last, trainer.is_fsdp_enabled)
        if trainer.is_fsdp_enabled:
            set_up_fsdp(trainer)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        if trainer.is_fsdp_enabled:
            gather(trainer)
        trainer.give_back()
    if this_process().leads or not trainer.is_fsdp_enabled:
        if options.train != "full":
            adapters = take_off(trained)
            if model.dtype != dtype:
                cast(nn.Module, model).to("meta")  # nothing of the copy is needed any more
                give_back_memory()
                model = load()
            merge(adapters, model)
        model.tie_weights()
        cast(nn.Module, model).to(dtype).eval()
    return model, trainer.state


def _record(
    state: TrainerState, examples: Examples, options: RecoveryOptions, method: Literal["labels", "distillation"]
) -> RecoveryRecord:
    count, steps = len(examples.training), total_steps(examples, options)
    # A call that was killed after the last step makes one more, at a learning rate of zero.
    done = min(state.global_step, steps)
    # The last batch of an epoch may be smaller.
    epochs, further = divmod(done, math.ceil(count / options.batch_size))
    seen = epochs * count + further * options.batch_size
    return RecoveryRecord(
        config=options.model_dump(mode="json"),
        method=method,
        training_examples=count,
        validation_examples=len(examples.validation),
        skipped_records=examples.skipped,
        steps=done,
        tokens=round(examples.tokens / count * seen),
        loss_before=next(entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry),
        loss_after=float(state.best_metric if state.best_metric is not None else math.nan),
        best_step=min(int(state.best_global_step or done), steps),
        seconds=sum(entry.get("train_runtime", 0.0) for entry in state.log_history),
    )


def check_device(device: torch.device) -> None:
    """Refuses a GPU that the Trainer does not train on: in a single process, any but the first.

    Raises:
        AdaPrunerError: with a way to use that GPU.
    """
    if device.type != "cpu" and device.index and this_process().count == 1:
        raise AdaPrunerError(
            f"training runs on the first accelerator and not on {device}: set"
            f" {_VISIBLE.get(device.type, 'its variable for visible devices')}={device.index} and leave `device` out"
        )


def check_batch_size(size: int) -> None:
    """Refuses a batch that cannot be divided among the processes.

    Raises:
        AdaPrunerError: with the numbers.
    """
    if size % (processes := this_process().count):
        raise AdaPrunerError(f"`batch_size` {size} cannot be divided among {processes} processes")


def total_steps(examples: Examples, options: RecoveryOptions) -> int:
    """The number of steps of the optimizer."""
    return options.steps or options.epochs * math.ceil(len(examples.training) / options.batch_size)


def _arguments(
    model: PreTrainedModel, options: RecoveryOptions, folder: Path, steps: int, evaluates_first: bool
) -> TrainingArguments:
    device = model.device
    check_batch_size(options.batch_size)
    per_process = options.batch_size // this_process().count
    # The largest size that divides a batch.
    micro_batch = next(size for size in range(options.micro_batch_size, 0, -1) if per_process % size == 0)
    interval = max(1, min(_MOST_STEPS_BETWEEN, steps // _VALIDATIONS))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=per_process // micro_batch,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=options.learning_rate,
        # A short run would end before it is warm.
        warmup_steps=min(options.warmup_steps, steps // 10),
        eval_on_start=evaluates_first,
        eval_strategy="steps",
        eval_steps=interval,
        save_steps=interval,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        bf16=options.train == "full" and computes_bfloat16_natively(device),
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        # The norms of removed attention and feed-forward parts. Finding them means a walk over the graph in every step.
        ddp_find_unused_parameters=any(isinstance(module, Nothing) for module in cast(nn.Module, model).modules()),
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
    if arguments.n_gpu > 1:
        # One process trains on one GPU; otherwise the Trainer would give every GPU a batch of that size.
        arguments._n_gpu = 1
    return arguments


def _batch(examples: list[Example]) -> dict[str, Tensor]:
    """[examples, tokens of the longest]: padded tokens and labels, and the attention mask."""
    columns = {
        "input_ids": (0, [example["input_ids"] for example in examples]),
        "labels": (IGNORED, [example["labels"] for example in examples]),
        "attention_mask": (0, [[1] * len(example["input_ids"]) for example in examples]),
    }
    return {
        name: pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
        for name, (padding, rows) in columns.items()
    }


class _Watcher(TrainerCallback):
    """Reports progress, and stops when the loss is not finite, before anything is saved."""

    def __init__(
        self,
        progress: Callable[[int], None] | None,
        folder: Path,
        track: Callable[[Mapping[str, float]], None],
    ) -> None:
        self._progress, self._folder, self._track = progress, folder, track

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best = self._folder / f"checkpoint-{state.best_global_step}"
        if best.is_dir():  # the state has the path of the folder at the time when it was saved
            state.best_model_checkpoint = str(best)
        if self._progress and state.global_step:
            self._progress(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress and state.global_step <= state.max_steps:
            self._progress(1)
        if state.global_step >= state.max_steps:  # the last weights are candidates too, whatever the interval
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self._track({f"recovery/{name}": value for name, value in (logs or {}).items()})
        watched = {"loss": "the loss", "eval_loss": "the validation loss", "grad_norm": "the gradient"}
        for name, title in watched.items():
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                saved = _last_whole_checkpoint(self._folder)
                kept = f"the last checkpoint, {saved}, is kept" if saved else "nothing was saved yet"
                raise NonFiniteError(
                    f"{title} is {value} at step {state.global_step}; {kept}. Lower `learning_rate`"
                    f" ({args.learning_rate:g}) or raise `warmup_steps`, and look for broken records in the data"
                )


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is complete: the Trainer writes its state last."""
    complete = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):
            complete.append((int(json.loads(state.read_text(encoding="utf-8"))["global_step"]), state.parent))
    return max(complete)[1] if complete else None
