"""Training through the Trainer of transformers: LoRA (arXiv 2106.09685), IA3 (arXiv 2205.05638) or all weights, on
labels or on a teacher."""

import contextlib
import gc
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from adapruner.base.errors import NonFiniteError
from adapruner.base.processes import random_state_kept, this_process
from adapruner.base.progress import give_back_memory
from adapruner.model.layers import decoder_layers, hold_places, is_streamed, layer_devices
from adapruner.model.loading import copy_in_dtype
from adapruner.model.places import quiet_transformers
from adapruner.model.stored import deferred_by_module, read_all
from adapruner.options import RecoveryOptions
from adapruner.remote_code.modeling_pruned import Nothing
from adapruner.train.examples import Examples, MixedExamples, collate, examples_to_learn, steps_between_validations
from adapruner.train.loss import sample_vocabulary
from adapruner.train.trainer import (
    TokenTrainer,
    frozen,
    merge,
    multiplies_in_bfloat16,
    refuse_other_sharding,
    sharded,
    trainer_options,
    unload_adapters,
    with_adapters,
)


class LearntPart(BaseModel, extra="forbid", frozen=True):
    """Examples of a dataset, in a recovery.

    Attributes:
        share: the fraction of all examples, as given.
        examples: different training examples.
        learnt: examples that were read.
        tokens: tokens of these, prompts included.
        passes: over the training examples.
    """

    share: float
    examples: int
    learnt: int
    tokens: int
    passes: float


class RecoveryRecord(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """The outcome of a recovery: the content of `recovery.json`.

    Attributes:
        config: all options, and in `recovery.json` the model and the data.
        skipped_records: records that were left out because their answer is empty or beyond the cut-off.
        steps: steps of the optimizer.
        tokens: tokens of all examples that were read, prompts included.
        loss_before: validation loss before the first step, in nats per token; for distillation, the weighted sum of
            this and the divergence from the teacher, which is estimated over a `VocabularySample` if there is one.
        loss_after: the least validation loss, which is that of the kept weights.
        best_step: the step with that loss.
        seconds: of training, in the last call.
        parts: by the name of the dataset.
    """

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
    parts: dict[str, LearntPart] = {}


def train(
    load: Callable[[], PreTrainedModel],
    blend: Sequence[Examples],
    options: RecoveryOptions,
    folder: Path,
    teacher: PreTrainedModel | None = None,
    progress: Callable[[int], None] | None = None,
    loss_before: float | None = None,
) -> tuple[PreTrainedModel, RecoveryRecord]:
    """Trains a model; a call that was killed resumes from its last saved step. Processes that were started together
    share every batch. The random state of the program is left as it was.

    The frozen weights below LoRA, and those of linear layers below scales, are held in bfloat16 if the hardware
    computes that natively. Adapters are merged into the original weights, in their dtype. All weights, and scales, are
    trained in float32, with bfloat16 products if those are native. Nothing is trained in float16.

    Args:
        load: gives the model, whose weights change. Called a second time, to merge adapters, if they are trained on a
            copy: the two are never in memory together, unless they are held elsewhere. The layers may be streamed if
            adapters are trained, in one process; the adapters are then merged whenever a layer is read.
        blend: the examples of every dataset; each batch has them in their shares.
        folder: for the Trainer's checkpoints.
        teacher: its predictions are learnt, as the label weights of the examples say; it is run in its own dtype.
        progress: called with the number of steps done.
        loss_before: the validation loss before the first step, if it is known.

    Returns:
        The model in evaluation mode, and the record. With FSDP, the first process alone has all weights.
    """
    model, state, mixed = _trained(load, blend, options, folder, teacher, progress, loss_before is None)
    # The Trainer is part of reference cycles that hold the teacher and the trained copy.
    gc.collect()
    # A call that was killed after the last step makes one more, at a learning rate of zero.
    done = min(state.global_step, state.max_steps)
    learnt = mixed.learnt(min(done * options.batch_size, len(mixed)))
    parts = {
        examples.name: LearntPart(
            share=examples.share,
            examples=len(examples.training),
            learnt=count,
            tokens=round(examples.mean_tokens * count),
            passes=round(count / len(examples.training), 3),
        )
        for examples, count in zip(blend, learnt, strict=True)
    }
    distils = teacher is not None or "taught" in blend[0].training[0]
    return model, RecoveryRecord(
        config=options.model_dump(mode="json"),
        method="distillation" if distils else "labels",
        training_examples=sum(len(examples.training) for examples in blend),
        validation_examples=sum(len(examples.validation) for examples in blend),
        skipped_records=sum(examples.skipped for examples in blend),
        steps=done,
        tokens=sum(part.tokens for part in parts.values()),
        loss_before=next(_validated(state)) if loss_before is None else loss_before,
        loss_after=float(state.best_metric if state.best_metric is not None else math.nan),
        best_step=min(int(state.best_global_step or done), state.max_steps),
        seconds=sum(entry.get("train_runtime", 0.0) for entry in state.log_history),
        parts=parts,
    )


def try_training(
    load: Callable[[], PreTrainedModel],
    blend: Sequence[Examples],
    options: RecoveryOptions,
    folder: Path,
    teacher: PreTrainedModel | None,
    progress: Callable[[int], None] | None = None,
    loss_before: float | None = None,
) -> tuple[float, float]:
    """The validation loss before and after a short training, of which nothing else is kept; see `train`."""
    _, state, _ = _trained(load, blend, options, folder, teacher, progress, loss_before is None, is_kept=False)
    gc.collect()
    before, *_, after = (loss_before, *_validated(state)) if loss_before is not None else _validated(state)
    return before, after


def _validated(state: TrainerState) -> Iterator[float]:
    """The validation losses of a training."""
    return (entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry)


def _trained(
    load: Callable[[], PreTrainedModel],
    blend: Sequence[Examples],
    options: RecoveryOptions,
    folder: Path,
    teacher: PreTrainedModel | None,
    progress: Callable[[int], None] | None,
    validates_first: bool = True,
    is_kept: bool = True,
) -> tuple[PreTrainedModel, TrainerState, MixedExamples]:
    """The model after training all of its weights, or adapters that are merged into them; the Trainer's state; and
    the examples. If it is not to be kept, no checkpoints are saved."""
    model, is_copy = load(), False
    # Routers of mixtures have tensors in float32 beside others in bfloat16.
    dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    trains_adapters = options.train in ("lora", "ia3")
    if trains_adapters:
        loaded = id(model)
        model = frozen(model, options.train)
        is_copy = id(model) != loaded
        if is_streamed(model):
            hold_places(model)
    elif deferred_by_module(model):
        model = copy_in_dtype(model, torch.float32)
    else:
        cast(nn.Module, model).float()
    if options.train == "layers":
        cast(nn.Module, model).requires_grad_(False)
        for layer in decoder_layers(model):
            layer.requires_grad_(True)
    with random_state_kept(), quiet_transformers(), warnings.catch_warnings():
        # PEFT, the Trainer and PyTorch warn about intended settings, and about each other.
        warnings.simplefilter("ignore")
        set_seed(options.seed)
        trained: object = with_adapters(model, options) if trains_adapters else model
        if len(devices := {*layer_devices(model)}) > 1:
            # By this, the Trainer knows that it is not to move the model.
            cast(Any, model).hf_device_map = dict(enumerate(devices))
        mixed = MixedExamples(blend, examples_to_learn(blend, options), options.seed)
        last = _last_checkpoint(folder)
        trainer = TokenTrainer(
            model,
            teacher,
            options.temperature,
            sample_vocabulary(model, blend, options.seed) if teacher else None,
            model=trained,
            args=_arguments(
                model, options, folder, total_steps(blend, options), validates_first and last is None, is_kept
            ),
            train_dataset=mixed,
            eval_dataset=[example for examples in blend for example in examples.validation],
            data_collator=collate,
            callbacks=[_Watcher(progress, folder)],
        )
        trainer.remove_callback(PrinterCallback)
        if last:
            refuse_other_sharding(last, trainer.is_fsdp_enabled)
        with sharded(trainer) if trainer.is_fsdp_enabled else contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        trainer.give_back()
    if is_kept and (this_process().leads or not trainer.is_fsdp_enabled):
        if trains_adapters:
            adapters = unload_adapters(trained)
            if is_copy:
                cast(nn.Module, model).to("meta")  # nothing of the copy is needed any more
                give_back_memory()
                model = load()
                read_all(model)
            merge(adapters, model)
        model.tie_weights()
        cast(nn.Module, model).requires_grad_(True).eval()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.data = tensor.data.to(dtypes[name])
    return model, trainer.state, mixed


def total_steps(blend: Sequence[Examples], options: RecoveryOptions) -> int:
    """The number of steps of the optimizer."""
    return math.ceil(examples_to_learn(blend, options) / options.batch_size)


def _arguments(
    model: PreTrainedModel, options: RecoveryOptions, folder: Path, steps: int, evaluates_first: bool, is_kept: bool
) -> TrainingArguments:
    device = model.device
    # The examples of a forward pass of a process, as many as divide its part of a batch.
    per_process = options.batch_size // this_process().count
    micro_batch = next(size for size in range(options.micro_batch_size, 0, -1) if per_process % size == 0)
    interval = steps_between_validations(steps) if is_kept else steps
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        train_sampling_strategy="sequential",  # the examples are in the order in which they are learnt
        # Or every process would add up whole gradients until a step.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": this_process().shares_weights}},
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=per_process // micro_batch,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **trainer_options(options),
        learning_rate=options.learning_rate,
        # A short run would end before it is warm. One that is tried warms up to its end, as a whole short one begins.
        warmup_steps=min(options.warmup_steps, steps // 10) if is_kept else steps,
        eval_on_start=evaluates_first,
        eval_strategy="steps",
        eval_steps=interval,
        save_strategy="steps" if is_kept else "no",
        save_steps=interval,
        save_total_limit=2,
        load_best_model_at_end=is_kept,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        bf16=multiplies_in_bfloat16(options.train, device),
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        # The norms of removed attention. Finding them means a walk over the graph in every step.
        ddp_find_unused_parameters=any(isinstance(module, Nothing) for module in cast(nn.Module, model).modules()),
        disable_tqdm=True,
        seed=options.seed,
    )
    if arguments.n_gpu > 1:
        # One process trains on one GPU; otherwise the Trainer would give every GPU a batch of that size.
        arguments._n_gpu = 1
    return arguments


class _Watcher(TrainerCallback):
    """Reports progress, and stops when the loss is not finite, before anything is saved."""

    def __init__(self, progress: Callable[[int], None] | None, folder: Path) -> None:
        self._progress, self._folder = progress, folder

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        best = self._folder / f"checkpoint-{state.best_global_step}"
        if best.is_dir():  # the state has the path of the folder at the time when it was saved
            state.best_model_checkpoint = str(best)
        if self._progress and state.global_step:
            self._progress(state.global_step)

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._progress and state.global_step <= state.max_steps:
            self._progress(1)
        if state.global_step >= state.max_steps:  # the last weights are candidates too, whatever the interval
            control.should_evaluate = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        watched = {"loss": "the loss", "eval_loss": "the validation loss", "grad_norm": "the gradient"}
        for name, title in watched.items():
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                saved = _last_checkpoint(self._folder)
                kept = f"the last checkpoint, {saved}, is kept" if saved else "nothing was saved yet"
                raise NonFiniteError(
                    f"{title} is {value} at step {state.global_step}; {kept}. Lower `learning_rate`"
                    f" ({args.learning_rate:g}) or raise `warmup_steps`, and look for broken records in the data"
                )


def _last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is complete: the Trainer writes its state last."""
    complete = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):
            complete.append((int(json.loads(state.read_text(encoding="utf-8"))["global_step"]), state.parent))
    return max(complete)[1] if complete else None
