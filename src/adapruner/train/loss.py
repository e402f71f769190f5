"""The loss of training, of labels and of a teacher's predictions, whose gradient is computed in the forward pass; and
predictions on disk, of a teacher that does not fit beside the model that is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from adapruner.base.files import write_atomically
from adapruner.base.processes import this_process
from adapruner.model.architecture import architecture_of
from adapruner.model.layers import is_streamed, other_forwards
from adapruner.options import RecoveryOptions
from adapruner.train.examples import IGNORED, Example, Examples, Taught, collate

# Predictions that are in memory at once, in float32.
PREDICTIONS_AT_ONCE = 256
# For all that a text does not have. Measured with 13,069 (research/experiments/healing.md).
DRAWN_TOKENS = 12_288


@dataclass(frozen=True)
class VocabularySample:
    """Tokens over which predictions are compared instead of all, which take most of a training: those of a text, and a
    random draw of the others (the sampled softmax of arXiv 1412.2007).

    Attributes:
        tokens: [sampled tokens], int64, ascending.
        log_counts: [sampled tokens], float32: the logarithm of the number of tokens that each stands for.
    """

    tokens: Tensor
    log_counts: Tensor


def loss_and_gradient(
    student: Tensor, teacher: Tensor | None, labels: Tensor, label_weights: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of labels and the divergence from a teacher, KL(teacher ‖ student) · T² (Hinton et
    al., arXiv 1503.02531), each with a weight. Published kernels compute one of the two alone.

    Args:
        student, teacher: logits, [predictions, vocabulary], float32 or wider; without a teacher, labels alone.
        labels: [predictions], int64.
        label_weights: [predictions], from 0 to 1; the divergence has the rest.
        temperature: divides the logits of both models in the divergence.

    Returns:
        A scalar, in nats, summed over the predictions; and its gradient with respect to the logits of the student.
    """
    weights, of_labels = label_weights[:, None].to(student), labels[:, None]
    likelihoods = student.log_softmax(-1)
    total = -(weights * likelihoods.gather(-1, of_labels)).sum()
    if teacher is None:
        gradient = likelihoods.exp_().mul_(weights)
    else:
        if temperature != 1:
            student, teacher = student / temperature, teacher / temperature
        softened = likelihoods if temperature == 1 else student.log_softmax(-1)
        taught = teacher.log_softmax(-1)
        probabilities = taught.exp()
        divergences = torch.linalg.vecdot(probabilities, taught.sub_(softened))
        total = total + temperature**2 * ((1 - label_weights.to(student)) * divergences).sum()
        if temperature == 1:
            gradient = likelihoods.exp_()
        else:
            gradient = softened.exp_().mul_((1 - weights) * temperature).add_(likelihoods.exp_().mul_(weights))
        gradient.sub_(probabilities.mul_((1 - weights) * temperature))
    return total, gradient.scatter_add_(-1, of_labels, -weights)


def fill_teacher(student: Tensor, tokens: Tensor, log_probabilities: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits of a teacher whose most probable tokens are known: the mass of the others is distributed as the student
    distributes its own. With them, `loss_and_gradient` computes the divergence over these tokens and one class of all
    others, which is at most the full one.

    Args:
        student: logits, [predictions, vocabulary].
        tokens: [predictions, tokens that are known], int64.
        log_probabilities: of these at the temperature, in nats, float32.

    Returns:
        [predictions, vocabulary], in the dtype of the student.
    """
    filled = (student / temperature).log_softmax(-1)
    smallest = torch.finfo(filled.dtype).tiny
    of_teacher, of_student = (
        (1 - known.to(filled).exp().sum(-1, keepdim=True)).clamp_min(smallest).log()
        for known in (log_probabilities, filled.gather(-1, tokens))
    )
    filled += of_teacher - of_student
    return filled.scatter_(-1, tokens, log_probabilities.to(filled)).mul_(temperature)


class Predictor:
    """A model whose predictions are made from hidden states, some tokens at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._forward = model, type(model).forward
        self.device = model.device  # of the tokens
        self._decoder: Any = model.get_submodule(architecture_of(model.config).layers.rpartition(".")[0])
        self._output_class: Any = None
        self._others: dict[str, Any] = {}

    @property
    def head(self) -> nn.Module:
        """The module that makes the logits."""
        return cast(nn.Module, self._model.get_output_embeddings())

    def called(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """`hidden_states` in a call of the model: with FSDP, its weights outside of layers are whole from then on."""
        with other_forwards({self._model: self.hidden_states}):
            return cast(Tensor, self._model(tokens, attention_mask))

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """[sequences, tokens, width]: the output of the decoder, for tokens and mask of [sequences, tokens]."""
        output = self._decoder(input_ids=tokens, attention_mask=attention_mask, use_cache=False)
        self._others = {name: value for name, value in output.items() if name != "last_hidden_state"}
        self._output_class = type(output)
        return cast(Tensor, output.last_hidden_state)

    def logits(self, hidden: Tensor, sample: VocabularySample | None = None) -> Tensor:
        """[rows, vocabulary, or tokens of a sample] of hidden states of [rows, width], by the model's own forward, with
        all that a family does around its head."""
        # Some families read the shape of the tokens after their decoder.
        tokens = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        output = self._output_class(last_hidden_state=hidden[None], **self._others)
        forwards: dict[nn.Module, Callable[..., object]] = {self._decoder: lambda *arguments, **named: output}
        if sample:
            forwards[self.head] = partial(_linear, self.head, sample.tokens)
        with other_forwards(forwards):
            return cast(Tensor, self._forward(self._model, tokens, use_cache=False).logits[0])


def _linear(head: Any, outputs: Tensor, hidden: Tensor) -> Tensor:
    """[rows, outputs]: some outputs of a linear layer, for hidden states of [rows, width]."""
    outputs = outputs.to(head.weight.device)
    return functional.linear(hidden, head.weight[outputs], None if head.bias is None else head.bias[outputs])


def sample_vocabulary(student: PreTrainedModel, blend: Sequence[Examples], seed: int) -> VocabularySample | None:
    """The sample to train on, the same in every process and in every call; None where all tokens are needed: labels are
    learnt, the head is trained or sharded, or the vocabulary is small."""
    examples = [example for part in blend for example in (*part.training, *part.validation)]
    head = student.get_output_embeddings()
    learns_labels = any(example["label_weight"] for example in examples)
    if learns_labels or this_process().shares_weights or not isinstance(head, nn.Linear) or head.weight.requires_grad:
        return None
    drawn = torch.randperm(head.out_features, generator=torch.Generator().manual_seed(seed))
    in_text = torch.zeros(head.out_features, dtype=torch.bool)
    in_text[torch.tensor([*{token for example in examples for token in example["input_ids"]}])] = True
    others = drawn[~in_text[drawn]]
    if len(others) <= DRAWN_TOKENS:
        return None
    counts = in_text.float()
    counts[others[:DRAWN_TOKENS]] = len(others) / DRAWN_TOKENS
    tokens = counts.nonzero()[:, 0]
    return VocabularySample(tokens, counts[tokens].log())


def loss_of_batch(
    student: Predictor,
    hidden: Tensor,
    labels: Tensor,
    label_weights: Tensor,
    scale: float = 1.0,
    temperature: float = 1.0,
    teacher: Predictor | None = None,
    taught: Tensor | tuple[Tensor, Tensor] | None = None,
    sample: VocabularySample | None = None,
) -> Tensor:
    """The loss of a batch: see `loss_and_gradient`. Logits are in memory for some predictions at a time.

    Args:
        hidden: of the student, [sequences, tokens, width].
        labels: [sequences, tokens], int64; -100 for tokens that are not learnt.
        label_weights: [sequences], from 0 to 1.
        scale: factor of the sum. In bfloat16, gradients depend in their last bits on where they are multiplied.
        teacher: with `taught`, its hidden states.
        taught: without a teacher, its most probable tokens and their log-probabilities for all learnt tokens, each
            [learnt tokens, tokens that are known]; None learns the labels alone.
        sample: of the vocabulary, with all labels, over which the loss is estimated.

    Returns:
        A scalar: nats, summed over the learnt tokens, times the scale.
    """
    labels = labels[:, 1:].to(hidden.device)
    learnt = labels != IGNORED
    weights = label_weights[:, None].to(hidden.device).expand(labels.shape)[learnt]
    rows, labels = hidden[:, :-1][learnt], labels[learnt]
    wanted = taught[:, :-1][learnt.to(taught.device)] if isinstance(taught, Tensor) else None

    if sample:
        labels = torch.searchsorted(sample.tokens.to(labels.device), labels)

    def logits_of(model: Predictor, hidden: Tensor) -> Tensor:
        logits = model.logits(hidden, sample)
        # In float32, and so that a softmax at the temperature has the counts as factors.
        return logits if sample is None else logits + temperature * sample.log_counts.to(logits.device)

    def loss_of(hidden: Tensor, start: int) -> Tensor:
        chunk = slice(start, start + PREDICTIONS_AT_ONCE)
        logits = logits_of(student, hidden)
        with torch.no_grad():
            expected = None
            if teacher is not None and wanted is not None:
                expected = logits_of(teacher, wanted[chunk])
            elif isinstance(taught, tuple):
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                tokens, log_probabilities = taught
                expected = fill_teacher(wide, tokens[chunk], log_probabilities[chunk], temperature)
        apply: Any = _LossOfLogits.apply
        return cast(Tensor, apply(logits, expected, labels[chunk], weights[chunk], scale, temperature))

    chunks = [(chunk, number * PREDICTIONS_AT_ONCE) for number, chunk in enumerate(rows.split(PREDICTIONS_AT_ONCE))]
    if isinstance(student.head, FSDPModule):
        # Its weights are whole only while it runs.
        losses = [checkpoint(loss_of, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    elif not torch.is_grad_enabled():
        losses = [loss_of(*chunk) for chunk in chunks]
    else:
        losses = [_with_gradients(loss_of, rows, chunks, [w for w in student.head.parameters() if w.requires_grad])]
    return torch.stack(losses).sum()


def _with_gradients(
    loss_of: Callable[[Tensor, int], Tensor],
    rows: Tensor,
    chunks: list[tuple[Tensor, int]],
    weights: list[nn.Parameter],
) -> Tensor:
    """The sum of the losses of all chunks of rows. Its gradients with respect to the rows and the weights of the head
    are computed now, so that no logits are computed twice."""
    total = torch.zeros((), device=rows.device)
    of_rows = []
    of_weights = [
        torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights
    ]
    for chunk, start in chunks:
        inputs = chunk.detach().requires_grad_()
        loss = loss_of(inputs, start)
        total = total + loss.detach()
        of_inputs, *further = torch.autograd.grad(loss, [inputs, *weights])
        of_rows.append(of_inputs)
        for accumulated, gradient in zip(of_weights, further, strict=True):
            accumulated += gradient
    # Linear in all that the loss depends on, with the gradients of the loss.
    pairs = zip([rows, *weights], [torch.cat(of_rows), *of_weights], strict=True)
    dots = [torch.dot(value.flatten(), gradient.to(value).flatten()).to(total) for value, gradient in pairs]
    linear = torch.stack(dots).sum()
    return total + (linear - linear.detach())


class _LossOfLogits(torch.autograd.Function):
    """`loss_and_gradient` of logits in any dtype, times a scale."""

    @staticmethod
    def forward(context: FunctionCtx, logits: Tensor, expected: Tensor | None, *settings: Any) -> Tensor:
        labels, weights, scale, temperature = settings
        wide = torch.promote_types(logits.dtype, torch.float32)
        with torch.autocast(logits.device.type, enabled=False):
            teacher = None if expected is None else expected.to(logits.device, wide)
            loss, gradient = loss_and_gradient(logits.to(wide), teacher, labels, weights, temperature)
        context.save_for_backward(gradient.mul_(scale).to(logits.dtype))
        scaled: Tensor = loss * scale
        return scaled

    @staticmethod
    def backward(context: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        return gradient * outer[0], None, None, None, None, None


# Examples in a file. Layer by layer, they are computed together.
_EXAMPLES = 64


def write_predictions(
    teacher: PreTrainedModel,
    blend: Sequence[Examples],
    options: RecoveryOptions,
    folder: Path,
    progress: Callable[[int], None] = lambda examples: None,
) -> list[Examples]:
    """Writes the most probable tokens of a teacher, which may be streamed or sharded, and their log-probabilities at
    the temperature of the options, for every learnt token of all examples. Processes share the files out; those that
    exist are kept: the examples are the same in every call. Returns the examples with their predictions."""
    files: dict[Path, Sequence[Example]] = {}

    def taught(examples: Sequence[Example]) -> list[Example]:
        placed: list[Example] = []
        for first in range(0, len(examples), _EXAMPLES):
            file = folder / f"{len(files):06}.safetensors"
            files[file] = examples[first : first + _EXAMPLES]
            learnt = [sum(label != IGNORED for label in example["labels"][1:]) for example in files[file]]
            rows = pairwise(accumulate(learnt, initial=0))
            placed += [
                {**example, "taught": Taught(str(file), *row)} for example, row in zip(files[file], rows, strict=True)
            ]
        return placed

    placed = [replace(part, training=taught(part.training), validation=taught(part.validation)) for part in blend]
    _wait()
    missing = [file for file in files if not file.exists()]
    _wait()
    progress(sum(len(examples) for file, examples in files.items() if file not in missing))
    process, predictor = this_process(), Predictor(teacher)
    for first in range(0, len(missing), process.count):
        # All processes run a sharded teacher together: in some, a file is repeated, or has fewer batches.
        file = missing[min(first + process.rank, len(missing) - 1)]
        at_once = _EXAMPLES if is_streamed(teacher) else options.micro_batch_size
        batches = [files[file][begin : begin + at_once] for begin in range(0, _EXAMPLES, at_once)]
        tensors = _most_probable(predictor, batches, options)
        if first + process.rank < len(missing):
            write_atomically(file, partial(save_file, tensors))
        progress(sum(len(files[name]) for name in missing[first : first + process.count]))
    _wait()
    return placed


@torch.no_grad()
def _most_probable(
    teacher: Predictor, batches: Sequence[Sequence[Example]], options: RecoveryOptions
) -> dict[str, Tensor]:
    """[learnt tokens, tokens that are known], int32, and their log-probabilities, float32. For an empty batch, the
    teacher runs the first one again."""
    found = []
    for examples in batches:
        batch = collate(examples or batches[0])
        hidden = teacher.called(batch["input_ids"].to(teacher.device), batch["attention_mask"].to(teacher.device))
        if not examples:
            continue
        learnt = hidden[:, :-1][(batch["labels"][:, 1:] != IGNORED).to(hidden.device)]
        for rows in learnt.split(PREDICTIONS_AT_ONCE):
            predicted = (teacher.logits(rows).float() / options.temperature).log_softmax(-1)
            found.append(predicted.topk(min(options.teacher_top or 1, predicted.shape[-1])))
    return {
        "tokens": torch.cat([top.indices for top in found]).int().cpu(),
        "log_probabilities": torch.cat([top.values for top in found]).cpu(),
    }


def _wait() -> None:
    if this_process().count > 1:
        PartialState().wait_for_everyone()
