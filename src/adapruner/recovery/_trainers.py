"""The Trainer of transformers, with losses per token: of the labels, or of the predictions of a teacher."""

from __future__ import annotations

from functools import cached_property
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from adapruner.recovery._examples import IGNORED, Example
from adapruner.recovery._loss import Predictor, loss_of_batch


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
