"""The Trainer of transformers, with losses per token: of the labels, or of the predictions of a teacher."""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer

from adapruner.config import RecoveryOptions
from adapruner.recovery._examples import IGNORED, Example


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
        labels: [sequences, tokens], int64; -100 for tokens that are not learnt.
        temperature: divides the logits of both.
        label_weight: weight of the labels' loss, from 0 to 1.
        count: the number of predicted tokens by which the sum is divided; by default, the learnt tokens of the labels.

    Returns:
        A scalar, nats per predicted token.
    """
    wanted = labels[:, 1:].to(student.device)
    sequences = zip(student[:, :-1], teacher[:, :-1], wanted, strict=True)
    # One sequence at a time, recomputed for the gradient: in float32, several tensors of the size of the vocabulary
    # would outweigh the model.
    losses = [
        checkpoint(_distillation_sum, *rows, temperature, label_weight, use_reentrant=False, preserve_rng_state=False)
        for rows in sequences
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


class TokenTrainer(Trainer):
    """A Trainer whose validation loss is the mean over tokens, and not over examples with the mean of their batch."""

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        loss, *logits_and_labels = super().prediction_step(model, inputs, *arguments, **named)
        assert loss is not None
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum().to(self.args.device)
        if self.model_accepts_loss_kwargs or self.compute_loss_func:
            # The Trainer has divided the sum over tokens by the mean number of tokens per process.
            tokens = self.accelerator.gather(tokens).float().mean()
        return (loss * (float(tokens) / len(inputs["labels"]) / self._tokens_per_example), *logits_and_labels)

    @cached_property
    def _tokens_per_example(self) -> float:
        """The mean number of learnt tokens per validation example."""
        rows = cast(list[Example], self.eval_dataset)
        return sum(label != IGNORED for row in rows for label in row["labels"][1:]) / len(rows)


class DistillationTrainer(TokenTrainer):
    """A Trainer that runs the teacher on every batch; its predictions are used at once and not kept."""

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
