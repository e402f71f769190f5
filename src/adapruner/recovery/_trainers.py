"""The Trainer of transformers, with losses per token; options that it would refuse late are refused early."""

from __future__ import annotations

import os
from functools import cached_property
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from adapruner.config import RecoveryOptions
from adapruner.errors import AdaPrunerError, reason
from adapruner.processes import this_process
from adapruner.recovery._examples import IGNORED, Example
from adapruner.recovery._loss import Predictor, loss_of_batch

# The environment variables that select the visible accelerators.
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}


class TokenTrainer(Trainer):
    """A Trainer whose loss is the mean over the learnt tokens of a whole batch, or of all validation examples.

    Args:
        student: `model` of the parts, or the model below its adapters. Its forward pass gives the loss until
            `give_back`.
        teacher: run on every batch; None learns the labels, or predictions on disk.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, temperature: float, **parts: Any
    ) -> None:
        self._student, self._predictor = student, Predictor(student)
        self._teacher = Predictor(teacher) if teacher else None
        self._temperature = temperature
        self._taught: Tensor | tuple[Tensor, Tensor] | None = None
        cast(Any, student).forward = MethodType(self._loss_of_batch, student)
        super().__init__(**parts)
        self.model_accepts_loss_kwargs = True  # it counts the tokens of a whole batch

    def give_back(self) -> None:
        """Gives the student its own forward pass back, without autocasts, and without references to this Trainer."""
        for name in ("forward", "_original_forward"):
            vars(self._student).pop(name, None)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        # FSDP would round what its model is given.
        self._label_weight, self._taught = inputs.pop("label_weight"), inputs.pop("taught", None)
        if self._teacher:
            with torch.no_grad():
                self._taught = self._teacher.called(inputs["input_ids"], inputs["attention_mask"])
        # The Trainer counts the learnt tokens of all processes, and averages gradients over them.
        self._scale = self.accelerator.num_processes / float(num_items_in_batch or 1)
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _loss_of_batch(
        self, student: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any
    ) -> dict[str, Tensor]:
        """Inside of what the Trainer wraps the model in: with FSDP, the weights of the head are whole there."""
        hidden = self._predictor.hidden_states(input_ids, attention_mask)
        parts = self._label_weight, self._scale, self._temperature, self._teacher, self._taught
        return {"loss": loss_of_batch(self._predictor, hidden, labels, *parts)}

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        loss, *logits_and_labels = super().prediction_step(model, inputs, *arguments, **named)
        assert loss is not None
        # The Trainer averages over examples. The sum over tokens was divided by the mean number per process.
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum().to(self.args.device)
        mean = float(self.accelerator.gather(tokens).float().mean())
        return (loss * (mean / len(inputs["labels"]) / self._tokens_per_example), *logits_and_labels)

    @cached_property
    def _tokens_per_example(self) -> float:
        """The mean number of learnt tokens per validation example."""
        rows = cast(list[Example], self.eval_dataset)
        return sum(label != IGNORED for row in rows for label in row["labels"][1:]) / len(rows)


def check_device(device: torch.device) -> None:
    """Refuses a GPU that the Trainer does not train on: in a single process, any but the first."""
    if device.type != "cpu" and device.index and this_process().count == 1:
        raise AdaPrunerError(
            f"training runs on the first accelerator and not on {device}: set"
            f" {_VISIBLE.get(device.type, 'its variable for visible devices')}={device.index} and leave `device` out"
        )


def check_processes(options: RecoveryOptions) -> None:
    """Refuses a batch that the processes cannot share equally."""
    size, processes = options.batch_size, this_process().count
    if size % processes:
        raise AdaPrunerError(f"`batch_size` {size} cannot be divided among {processes} processes")


def check_trainer_options(options: RecoveryOptions) -> None:
    """Refuses an optimizer or an experiment tracker that the Trainer does not know, or whose package is missing."""
    try:
        model: Any = nn.Linear(1, 1)
        arguments: Any = TrainingArguments("unused", **trainer_options(options))
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, NotImplementedError, ValueError) as error:
        raise AdaPrunerError(f"`optimizer` {options.optimizer}: {reason(error)}") from None
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise AdaPrunerError(f"`report_to` {options.report_to}: {reason(error)}") from None
    # The Trainer's default is a folder that is removed at the end of the training.
    if "tensorboard" in arguments.report_to and "TENSORBOARD_LOGGING_DIR" not in os.environ:
        raise AdaPrunerError(
            "`report_to` tensorboard: set the environment variable TENSORBOARD_LOGGING_DIR to a folder"
        )


def trainer_options(options: RecoveryOptions) -> dict[str, Any]:
    """The Trainer's arguments for the optimizer and the tracker; GaLore and APOLLO project the gradients of all linear
    layers."""
    return {"optim": options.optimizer, "optim_target_modules": "all-linear", "report_to": options.report_to}
