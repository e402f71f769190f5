"""The Trainer of transformers, with losses per token: of the labels, or of the predictions of a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from adapruner.models import in_fastest_dtype
from adapruner.recovery._examples import IGNORED, PADDING, Example
from adapruner.recovery._loss import Predictor, loss_of_batch
from adapruner.recovery._own_writing import OwnWriting


class TokenTrainer(Trainer):
    """A Trainer whose loss is the mean over the learnt tokens of a whole batch, or of all validation examples: of the
    labels, or of the predictions of a teacher, which is run on every batch; the student may write a part of it."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        temperature: float,
        own_writing: OwnWriting | None,
        **parts: Any,
    ) -> None:
        """
        Args:
            student: `model` of the parts, or the model below its adapters. Its forward pass gives the loss until
                `give_back`.
        """
        self._student, self._predictor = student, Predictor(student)
        self._teacher = Predictor(teacher) if teacher else None
        self._temperature, self._own_writing = temperature, own_writing
        self._taught: Tensor | tuple[Tensor, Tensor] | None = None
        cast(Any, student).forward = MethodType(self._loss_of_batch, student)
        super().__init__(**parts)
        self.model_accepts_loss_kwargs = True  # it counts the tokens of a whole batch

    def give_back(self) -> dict[str, Any]:
        """Gives the student its own forward pass back, without autocasts, and without references to this Trainer.

        Returns:
            The attributes that were removed.
        """
        attributes = vars(self._student)
        return {name: attributes.pop(name) for name in ("forward", "_original_forward") if name in attributes}

    @contextmanager
    def _writer(self) -> Iterator[PreTrainedModel]:
        """The student as it is now, or a copy, to write text with."""
        removed, was_training = self.give_back(), self._student.training
        try:
            with torch.no_grad():
                yield in_fastest_dtype(self._student.eval())
        finally:
            self._student.train(was_training)
            vars(self._student).update(removed)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches = map(self._with_own_writing, enumerate(epoch_iterator)) if self._own_writing else epoch_iterator
        return super().get_batch_samples(batches, num_batches, device)

    def _with_own_writing(self, numbered: tuple[int, dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch, to which examples are added that the student writes.

        Args:
            numbered: the number of the batch within its step, and the batch.
        """
        assert self._own_writing
        number, batch = numbered
        collate: Any = self.data_collator
        written = collate(self._own_writing.examples(self.state.global_step, number, self._writer))
        length = max(len(tokens["input_ids"][0]) for tokens in (batch, written))
        return {
            name: torch.cat([_padded(rows.to(values.device), length, name) for rows in (values, written[name])])
            for name, values in batch.items()
        }

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
        self,
        student: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        **_: Any,
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


def _padded(rows: Tensor, length: int, name: str) -> Tensor:
    """Rows of a column of a batch, as long as that on the right."""
    return functional.pad(rows, (0, length - rows.shape[1]), value=PADDING[name]) if name in PADDING else rows
