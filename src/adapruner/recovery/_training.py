"""Training through the Trainer of transformers: LoRA (arXiv 2106.09685), IA3 (arXiv 2205.05638) or all weights, on
labels or on a teacher."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as functional
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer import FSDP_MODEL_NAME

from adapruner.config import RecoveryOptions
from adapruner.errors import AdaPrunerError, NonFiniteError, reason
from adapruner.models import (
    architecture_of,
    computes_bfloat16_natively,
    copy_in_dtype,
    in_fastest_dtype,
    quiet_transformers,
)
from adapruner.models.modeling_pruned import Nothing
from adapruner.processes import this_process
from adapruner.random_state import random_state_kept
from adapruner.recovery._examples import IGNORED, Example, Examples

# The validation loss is measured, and everything saved to resume from, so often while training; or more often, every
# 200 steps as LLM-Pruner does.
_VALIDATIONS, _MOST_STEPS_BETWEEN = 10, 200
# The variables that say which accelerators a program sees.
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}


class RecoveryRecord(BaseModel):
    """What a recovery did: the content of `recovery.json`.

    Attributes:
        config: all options, and in `recovery.json` which model on which data.
        skipped_records: records that were left out because their answer is empty or beyond the cut-off.
        steps: steps of the optimizer.
        tokens: tokens that were learnt from, prompts included.
        loss_before: validation loss before the first step, in nats per token; of distillation, the weighted sum of this
            and the divergence from the teacher.
        loss_after: the least validation loss, that of the weights that were kept.
        best_step: after how many steps that was.
        seconds: of training, of the last call.
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
    model: PreTrainedModel,
    examples: Examples,
    options: RecoveryOptions,
    folder: Path,
    teacher: PreTrainedModel | None = None,
    progress: Callable[[int], None] | None = None,
    track: Callable[[Mapping[str, float]], None] = lambda values: None,
) -> RecoveryRecord:
    """Trains a model in place; a call that was killed resumes from its last saved step. Processes that were started
    together share every batch. The random state of the program is left as it was.

    The frozen weights below adapters, of LoRA or IA3, are held in bfloat16 where the hardware computes that natively,
    and the adapters are merged into the weights as they were, in their own dtype. All weights are trained in float32,
    with bfloat16 products where those are native. float16 is never trained in.

    Args:
        folder: for the Trainer's checkpoints.
        teacher: learn its predictions (see `distillation_loss`) and not the labels alone.
        progress: called with the number of steps done.
        track: called with what the Trainer logs, the losses and the learning rate of every step.

    Raises:
        NonFiniteError: the loss is not finite any more; what was saved before is kept.
    """
    dtype, weights = model.dtype, cast(nn.Module, model)
    if options.train == "full":
        weights.float()
    with random_state_kept(), quiet_transformers(), warnings.catch_warnings():
        # PEFT, the Trainer and PyTorch warn about what is meant here, and about each other.
        warnings.simplefilter("ignore")
        set_seed(options.seed)
        trained: Any = model if options.train == "full" else _with_adapters(_frozen(model), options)
        create = partial(_DistillationTrainer, in_fastest_dtype(teacher), options) if teacher else _TokenTrainer
        last = _last_whole_checkpoint(folder)
        trainer = create(
            model=trained,
            args=_arguments(model, options, folder, total_steps(examples, options), evaluates_first=last is None),
            train_dataset=examples.training,
            eval_dataset=examples.validation,
            data_collator=_batch,
            callbacks=[_Watcher(progress, folder, track)],
        )
        trainer.remove_callback(PrinterCallback)
        if last:
            _refuse_other_sharding(last, trainer.is_fsdp_enabled)
        if trainer.is_fsdp_enabled:
            _set_up_fsdp(trainer)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        if trainer.is_fsdp_enabled:
            _gather(trainer)
    if this_process().leads or not trainer.is_fsdp_enabled:
        if options.train != "full":
            _merge(trained, model)
        model.tie_weights()
        weights.to(dtype).eval()
    return _record(trainer.state, examples, options, "distillation" if teacher else "labels")


def _record(
    state: Any, examples: Examples, options: RecoveryOptions, method: Literal["labels", "distillation"]
) -> RecoveryRecord:
    count, steps = len(examples.training), total_steps(examples, options)
    # A call that was killed after the last step makes one more, at a learning rate of zero.
    done = min(state.global_step, steps)
    # The last batch of an epoch has what is left.
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
    """Refuses a GPU that the Trainer does not train on: of a process alone, any but the first.

    Raises:
        AdaPrunerError: with the way there.
    """
    if device.type != "cpu" and device.index and this_process().count == 1:
        raise AdaPrunerError(
            f"training runs on the first accelerator and not on {device}: set"
            f" {_VISIBLE.get(device.type, 'its variable for visible devices')}={device.index} and leave `device` out"
        )


def check_batch_size(size: int) -> None:
    """Refuses a batch that has no equal part for each process.

    Raises:
        AdaPrunerError: with the numbers.
    """
    if size % (processes := this_process().count):
        raise AdaPrunerError(f"`batch_size` {size} cannot be divided among {processes} processes")


def check_adapters(empty: PreTrainedModel, options: RecoveryOptions) -> None:
    """Refuses a family that adapters cannot be put on.

    Args:
        empty: a model without weights, which is of no use afterwards.

    Raises:
        AdaPrunerError: with the way there.
    """
    with random_state_kept(), quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _with_adapters(empty, options)


def total_steps(examples: Examples, options: RecoveryOptions) -> int:
    """Steps of the optimizer."""
    return options.steps or options.epochs * math.ceil(len(examples.training) / options.batch_size)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    label_weight: float,
    count: Tensor | int | None,
) -> Tensor:
    """The divergence of a model's predictions from a teacher's, KL(teacher ‖ student) · T² (Hinton et al., arXiv
    1503.02531), mixed with the negative log-likelihood of the labels.

    Args:
        student, teacher: logits, [sequences, tokens, vocabulary].
        labels: [sequences, tokens], int64; -100 where nothing is learnt.
        temperature: both distributions are softened by.
        label_weight: share of the labels' loss, from 0 to 1.
        count: how many predicted tokens the sum is divided by; by default those that are here.

    Returns:
        A scalar, nats per predicted token.
    """
    wanted = labels[:, 1:].to(student.device)
    parts = zip(student[:, :-1], teacher[:, :-1], wanted, strict=True)
    # A sequence at a time, computed once more for the gradient: in float32, several tensors of the size of the
    # vocabulary would outweigh the model.
    losses = [
        checkpoint(_distillation_sum, *part, temperature, label_weight, use_reentrant=False, preserve_rng_state=False)
        for part in parts
    ]
    total: Tensor = torch.stack(losses).sum()
    return total / ((wanted != IGNORED).sum() if count is None else count)


def _distillation_sum(
    student: Tensor, teacher: Tensor, wanted: Tensor, temperature: float, label_weight: float
) -> Tensor:
    """The loss of one sequence, summed over its tokens."""
    learnt = wanted != IGNORED
    predicted, target = student[learnt].float(), teacher[learnt].float()
    total = predicted.new_zeros(())
    if label_weight < 1:
        divergence = functional.kl_div(
            (predicted / temperature).log_softmax(-1),
            (target / temperature).log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
        total = total + (1 - label_weight) * temperature**2 * divergence
    if label_weight > 0:
        total = total + label_weight * functional.cross_entropy(predicted, wanted[learnt], reduction="sum")
    return total


class _TokenTrainer(Trainer):
    """The validation loss is the mean over tokens; the Trainer's is over examples, each with the mean of its batch."""

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        loss, *others = super().prediction_step(model, inputs, *arguments, **named)
        assert loss is not None
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum().to(self.args.device)
        if self.model_accepts_loss_kwargs or self.compute_loss_func:
            # The Trainer has divided the sum over tokens by the mean number of tokens per process.
            tokens = self.accelerator.gather(tokens).float().mean()
        return (loss * (float(tokens) / len(inputs["labels"]) / self._tokens_of_example), *others)

    @cached_property
    def _tokens_of_example(self) -> float:
        """The mean number of learnt tokens per validation example."""
        rows = cast(list[Example], self.eval_dataset)
        return sum(label != IGNORED for row in rows for label in row["labels"][1:]) / len(rows)


class _DistillationTrainer(_TokenTrainer):
    """Runs the teacher on every batch; its predictions are used at once and not kept."""

    def __init__(self, teacher: PreTrainedModel, options: RecoveryOptions, **parts: Any) -> None:
        super().__init__(**parts, compute_loss_func=self._loss)
        self._teacher, self._options = teacher, options
        self._taught = torch.empty(0)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        with torch.no_grad():
            self._taught = self._teacher(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits
        return super().compute_loss(model, inputs, *arguments, **named)

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        options = self._options
        return distillation_loss(
            outputs["logits"], self._taught, labels, options.temperature, options.label_weight, num_items_in_batch
        )


def _arguments(
    model: PreTrainedModel, options: RecoveryOptions, folder: Path, steps: int, evaluates_first: bool
) -> TrainingArguments:
    device = model.device
    processes = this_process().count
    check_batch_size(options.batch_size)
    of_process = options.batch_size // processes
    # The largest that divides a batch.
    micro_batch = next(n for n in range(options.micro_batch_size, 0, -1) if of_process % n == 0)
    every = max(1, min(_MOST_STEPS_BETWEEN, steps // _VALIDATIONS))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=of_process // micro_batch,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=options.learning_rate,
        # A short run would end before it is warm.
        warmup_steps=min(options.warmup_steps, steps // 10),
        eval_on_start=evaluates_first,
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
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
        # The norms of parts that were removed whole. Looking for them takes a walk through the graph in every step.
        ddp_find_unused_parameters=any(isinstance(module, Nothing) for module in cast(nn.Module, model).modules()),
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
    if arguments.n_gpu > 1:
        # One process trains on one GPU; otherwise the Trainer would give each of them a batch of that size.
        arguments._n_gpu = 1
    return arguments


def _batch(examples: list[Example]) -> dict[str, Tensor]:
    """[examples, tokens of the longest]: tokens, labels, and where there is something."""
    columns = {
        "input_ids": (0, [example["input_ids"] for example in examples]),
        "labels": (IGNORED, [example["labels"] for example in examples]),
        "attention_mask": (0, [[1] * len(example["input_ids"]) for example in examples]),
    }
    return {
        name: pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
        for name, (padding, rows) in columns.items()
    }


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or a copy of it in a dtype to train adapters in: not float16, and bfloat16 where that is fast."""
    if model.dtype == torch.float16:
        native = computes_bfloat16_natively(model.device)
        return copy_in_dtype(model, torch.bfloat16 if native else torch.float32)
    return in_fastest_dtype(model)


def _with_adapters(model: PreTrainedModel, options: RecoveryOptions) -> Any:
    """Adapters on every linear layer of the decoder layers, in float32: of LoRA, or with IA3 a scale for each input."""
    layers = architecture_of(model.config).layers
    linear = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(f"{layers}.") and isinstance(module, nn.Linear | Conv1D)
    }
    of_all: Any = {
        "target_modules": list(linear),
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in linear.values()),
        "task_type": "CAUSAL_LM",
    }
    config: PeftConfig
    if options.train == "ia3":
        # What PEFT calls feed-forward modules are those whose inputs are scaled, and not their outputs.
        config = IA3Config(feedforward_modules=list(linear), **of_all)
    else:
        config = LoraConfig(
            r=options.lora_rank, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout, **of_all
        )
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise AdaPrunerError(
            f"PEFT cannot put adapters on a {model.config.model_type} ({reason(error)}): set `train` to full"
        ) from error
    # PEFT would load saved adapters onto the first GPU, wherever the model is.
    adapted.load_adapter = partial(adapted.load_adapter, torch_device=str(model.device))
    return adapted


def _refuse_other_sharding(checkpoint: Path, sharded: bool) -> None:
    """The number of processes may change between calls, but not whether FSDP shares out the weights: the Trainer then
    saves them otherwise.

    Raises:
        AdaPrunerError: with the way there.
    """
    if (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file() != sharded:
        way = "without FSDP" if sharded else "with FSDP: launch it as before, with any number of processes, also one"
        raise AdaPrunerError(
            f"the training in {checkpoint.parent} resumes only {way}; delete that folder to start the training again"
        )


def _set_up_fsdp(trainer: Trainer) -> None:
    """By default FSDP gives the loss, and adds up gradients, in the dtype of the products; here both are float32. What
    training resumes from is saved whole, whatever the launcher says: any number of processes reads that, without
    unpickling.

    Raises:
        AdaPrunerError: it is FSDP 1, whose weights `_gather` cannot give back.
    """
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise AdaPrunerError(f"FSDP version {plugin.fsdp_version} is not supported: launch with --fsdp_version 2")
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def _gather(trainer: Trainer) -> None:
    """Gives the first process the whole of every weight that FSDP has shared out, in main memory, and makes its modules
    what they were before; the others keep their part. The model is there to be saved, not to be run."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not this_process().leads:
        return
    whole = cast(nn.Module, trainer.model)
    for module in whole.modules():
        if isinstance(module, FSDPModule):  # a class that was derived for the occasion from this and the real one
            cast(Any, module).__class__ = type(module).__mro__[2]
    for name, weight in state.items():
        path, _, own = name.rpartition(".")
        module = whole.get_submodule(path)
        if own in module._parameters:
            module._parameters[own] = nn.Parameter(weight, requires_grad=False)


def _merge(adapted: Any, model: PreTrainedModel) -> None:
    """Puts what the adapters learnt into the weights of a model, of which `adapted` may hold a copy in another dtype.
    One at a time: the changes of all weights together are twice as large as a model in bfloat16."""
    adapters = {
        name.removeprefix("base_model.model."): cast(Any, module)
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer | IA3Layer)
    }
    adapted.unload()
    with torch.no_grad():
        for name, adapter in adapters.items():
            layer: Any = model.get_submodule(name)
            weight = layer.weight
            if isinstance(adapter, IA3Layer):
                scales = adapter.ia3_l["default"].to(weight.device)  # [1, inputs]
                weight.copy_(weight.float() * (scales.T if isinstance(layer, Conv1D) else scales))
            else:
                merged = adapter.get_delta_weight("default").to(weight.device).float()
                weight.copy_(merged.add_(weight))


class _Watcher(TrainerCallback):
    """Passes on progress, and stops where the loss is not finite before anything is saved."""

    def __init__(
        self,
        progress: Callable[[int], None] | None,
        folder: Path,
        track: Callable[[Mapping[str, float]], None],
    ) -> None:
        self._progress, self._folder, self._track = progress, folder, track

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best = self._folder / f"checkpoint-{state.best_global_step}"
        if best.is_dir():  # the state names the place where the folder was when it was saved
            state.best_model_checkpoint = str(best)
        if self._progress and state.global_step:
            self._progress(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress and state.global_step <= state.max_steps:
            self._progress(1)
        if state.global_step >= state.max_steps:  # whatever the interval, the last weights are candidates too
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self._track({f"recovery/{name}": value for name, value in (logs or {}).items()})
        watched = {"loss": "the loss", "eval_loss": "the validation loss", "grad_norm": "the gradient"}
        for name, what in watched.items():
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                saved = _last_whole_checkpoint(self._folder)
                kept = f"the last checkpoint, {saved}, is kept" if saved else "nothing was saved yet"
                raise NonFiniteError(
                    f"{what} is {value} at step {state.global_step}; {kept}. Lower `learning_rate`"
                    f" ({args.learning_rate:g}) or raise `warmup_steps`, and look for broken records in the data"
                )


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end: its state is what the Trainer writes last."""
    whole = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((int(json.loads(state.read_text(encoding="utf-8"))["global_step"]), state.parent))
        except ValueError:
            continue
    return max(whole)[1] if whole else None
