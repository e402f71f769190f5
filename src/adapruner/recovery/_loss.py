"""The loss of training, of labels and of a teacher's predictions, whose gradient is computed in the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from adapruner.models import architecture_of
from adapruner.recovery._examples import IGNORED

# Predictions that are in memory at once, in float32.
_ROWS = 256


@dataclass(frozen=True)
class Objective:
    """The weights of the two losses of a prediction: its negative log-likelihood, and its divergence from that of a
    teacher, KL(teacher ‖ student) · T² (Hinton et al., arXiv 1503.02531).

    Attributes:
        temperature: divides the logits of both models in the divergence.
        label_weight: weight of the labels' loss, from 0 to 1; the divergence has the rest. Without a teacher, 1.
    """

    temperature: float = 1.0
    label_weight: float = 1.0

    def loss_and_gradient(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            student, teacher: logits, [predictions, vocabulary]; float32 or wider.
            labels: [predictions], int64.

        Returns:
            A scalar, in nats, summed over the predictions; and its gradient with respect to the logits of the student.
        """
        weight, temperature = self.label_weight, self.temperature
        likelihoods = student.log_softmax(-1)
        total = -weight * likelihoods.gather(-1, labels[:, None]).sum()
        if teacher is None or weight == 1:
            gradient = likelihoods.exp_().mul_(weight)
        else:
            if temperature != 1:
                student, teacher = student / temperature, teacher / temperature
            softened = likelihoods if temperature == 1 else student.log_softmax(-1)
            taught = teacher.log_softmax(-1)
            probabilities = taught.exp()
            divergence = torch.linalg.vecdot(probabilities, taught.sub_(softened)).sum()
            total = total + (1 - weight) * temperature**2 * divergence
            if temperature == 1:
                gradient = likelihoods.exp_()
            else:
                gradient = softened.exp_().mul_((1 - weight) * temperature).add_(likelihoods.exp_(), alpha=weight)
            gradient.sub_(probabilities, alpha=(1 - weight) * temperature)
        return total, gradient.scatter_add_(-1, labels[:, None], student.new_full((len(labels), 1), -weight))


class Predictor:
    """A model whose predictions are made from hidden states, some tokens at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._forward = model, type(model).forward
        self._decoder: Any = model.get_submodule(architecture_of(model.config).layers.rpartition(".")[0])
        self._output_class: Any = None
        self._others: dict[str, Any] = {}

    @property
    def head_weights(self) -> list[nn.Parameter]:
        """Those of the head that are trained. Within its forward pass, FSDP has other parameters than between them."""
        head: Any = self._model.get_output_embeddings()
        return [weight for weight in cast(nn.Module, head).parameters() if weight.requires_grad]

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """[sequences, tokens, width]: the output of the decoder, for tokens and mask of [sequences, tokens]."""
        output = self._decoder(input_ids=tokens, attention_mask=attention_mask, use_cache=False)
        self._others = {name: value for name, value in output.items() if name != "last_hidden_state"}
        self._output_class = type(output)
        return cast(Tensor, output.last_hidden_state)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocabulary] of hidden states of [rows, width], by the model's own forward, with all that a family does
        around its head."""
        # Some families read the shape of the tokens after their decoder.
        tokens = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        output = self._output_class(last_hidden_state=hidden[None], **self._others)
        with _returning(self._decoder, output):
            return cast(Tensor, self._forward(self._model, tokens, use_cache=False).logits[0])


@contextmanager
def _returning(module: nn.Module, output: ModelOutput) -> Iterator[None]:
    """The forward pass of a module gives an output that is known."""
    cast(Any, module).forward = lambda *arguments, **named: output
    try:
        yield
    finally:
        del cast(Any, module).forward


def summed_loss(
    student: Predictor,
    hidden: Tensor,
    labels: Tensor,
    objective: Objective,
    teacher: Predictor | None = None,
    taught: Tensor | None = None,
) -> Tensor:
    """The loss of a batch. Its gradients are computed at once, for some predictions at a time: no tensor of the size of
    all tokens times the vocabulary is ever in memory, and no logits are computed twice.

    Args:
        hidden: of the student, [sequences, tokens, width].
        labels: [sequences, tokens], int64; -100 for tokens that are not learnt.
        teacher: with `taught`, its hidden states; None learns the labels.

    Returns:
        A scalar, nats, summed over the learnt tokens.
    """
    labels = labels[:, 1:].to(hidden.device)
    learnt = labels != IGNORED
    wanted = None if taught is None else taught[:, :-1][learnt.to(taught.device)]
    apply: Any = _Loss.apply
    rows = hidden[:, :-1][learnt], labels[learnt]
    return cast(Tensor, apply(student, *rows, objective, teacher, wanted, *student.head_weights))


class _Loss(torch.autograd.Function):
    """`summed_loss` of rows. `torch.nn.functional.linear_cross_entropy` does the same for labels alone, without a
    teacher and without what some families do to their logits."""

    @staticmethod
    def forward(
        context: Any,
        student: Predictor,
        hidden: Tensor,
        labels: Tensor,
        objective: Objective,
        teacher: Predictor | None,
        taught: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        learns = context.needs_input_grad[1]
        of_weights = [torch.zeros_like(weight, dtype=total.dtype) for weight in weights if learns]
        of_hidden = []
        for start in range(0, len(labels), _ROWS):
            rows = slice(start, start + _ROWS)
            with torch.set_grad_enabled(learns):
                inputs = hidden[rows].detach().requires_grad_(learns)
                logits = student.logits(inputs)
            with torch.autocast(logits.device.type, enabled=False):
                expected = None if teacher is None or taught is None else teacher.logits(taught[rows]).to(total)
                loss, gradient = objective.loss_and_gradient(logits.detach().to(total), expected, labels[rows])
            total += loss
            if learns:
                of_inputs, *further = torch.autograd.grad(logits, [inputs, *weights], gradient.to(logits.dtype))
                of_hidden.append(of_inputs)
                for accumulated, gradient in zip(of_weights, further, strict=True):
                    accumulated += gradient
        if learns:
            of_all = torch.cat(of_hidden) if of_hidden else torch.zeros_like(hidden)
            context.save_for_backward(of_all, *(g.to(w.dtype) for g, w in zip(of_weights, weights, strict=True)))
        return total

    @staticmethod
    def backward(context: Any, *outer: Any) -> Any:
        of_hidden, *of_weights = context.saved_tensors
        return None, of_hidden * outer[0], None, None, None, None, *(gradient * outer[0] for gradient in of_weights)
