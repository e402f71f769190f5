"""The loss of training and its gradients, against those of all logits at once, in float64."""

import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapruner import RecoveryOptions
from adapruner.families import resolve
from adapruner.train import loss as _loss
from adapruner.train.examples import Example, Examples
from adapruner.train.loss import (
    Predictor,
    VocabularySample,
    fill_teacher,
    loss_and_gradient,
    loss_of_batch,
    sample_vocabulary,
)
from adapruner.train.trainer import with_adapters
from tiny_families import tiny_config

# What families do around their heads: soft caps, scales, a bias, a projection before it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 0.2},
    "phi": {},
    "opt": {"word_embed_proj_dim": 32},
    "gpt2": {},
    "gemma4_text": {},
}


class Objective(NamedTuple):
    """Weights of the labels' loss for three sequences, and the temperature of the divergence."""

    label_weights: tuple[float, float, float]
    temperature: float = 1.0

    @property
    def needs_teacher(self) -> bool:
        return min(self.label_weights) < 1


LABELS, MIXED = Objective((1, 1, 1)), Objective((0.25, 0, 1), 1.5)
OBJECTIVES = [LABELS, Objective((0, 0, 0)), Objective((0, 0, 0), 2.0), Objective((0.25, 1, 0)), MIXED]
# Of the mean over the learnt tokens of several batches.
SCALE = 0.3


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    monkeypatch.setattr(_loss, "PREDICTIONS_AT_ONCE", 5)


def double(family: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = tiny_config(family, **FAMILIES[family])
    resolve(config)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        for weight in head.parameters():
            weight.normal_(std=0.3)
    return model.double()  # in training mode, without dropout below


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and labels: of answers of different lengths, and padded."""
    tokens = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[0, :4] = labels[2] = -100
    return tokens, mask, labels


def naive_loss(student: Tensor, teacher: Tensor | None, labels: Tensor, objective: Objective) -> Tensor:
    """By the distributions of torch, a token at a time."""
    temperature, total = objective.temperature, student.new_zeros(())
    for sequence, position in (labels[:, 1:] != -100).nonzero().tolist():
        weight = objective.label_weights[sequence]
        predicted = torch.distributions.Categorical(logits=student[sequence, position])
        total = total - weight * predicted.log_prob(labels[sequence, position + 1])
        if teacher is not None:
            wanted, given = (
                torch.distributions.Categorical(logits=logits[sequence, position] / temperature)
                for logits in (teacher, student)
            )
            total = total + (1 - weight) * temperature**2 * torch.distributions.kl_divergence(wanted, given)
    return SCALE * total


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def our_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    objective: Objective,
    labels: Tensor | None = None,
    sample: VocabularySample | None = None,
) -> Tensor:
    tokens, mask, all_labels = batch()
    ours, theirs = Predictor(student), Predictor(teacher) if teacher else None
    with torch.no_grad():
        taught = theirs.hidden_states(tokens, mask) if theirs else None
    hidden = ours.hidden_states(tokens, mask)
    weights = torch.tensor(objective.label_weights)
    used = all_labels if labels is None else labels
    return loss_of_batch(ours, hidden, used, weights, SCALE, objective.temperature, theirs, taught, sample)


# One mix is enough to see what a family does around its head.
CASES = [*((family, OBJECTIVES[-1]) for family in FAMILIES), *(("llama", objective) for objective in OBJECTIVES[:-1])]


@pytest.mark.parametrize(("family", "objective"), CASES, ids=str)
def test_loss_and_gradients_are_those_of_all_logits(family, objective):
    student = double(family, 0).eval()
    teacher = double(family, 1).eval() if objective.needs_teacher else None
    tokens, mask, labels = batch()
    with torch.no_grad():
        taught = teacher(tokens, attention_mask=mask).logits if teacher else None
    expected = naive_loss(student(tokens, attention_mask=mask).logits, taught, labels, objective)
    expected_gradients = gradients(expected, student)
    loss = our_loss(student, teacher, objective)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    ours = gradients(loss, student)
    assert ours.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


def text_of_a_batch(label_weight: float = 0.0) -> Examples:
    examples = [Example(input_ids=row, labels=row, label_weight=label_weight) for row in batch()[0].tolist()]
    return Examples("text", examples[1:], examples[:1], 1.0)


def frozen_double(family: str, seed: int) -> PreTrainedModel:
    """Of a model whose head is trained, all tokens are needed."""
    model: Any = double(family, seed).eval()
    model.get_output_embeddings().requires_grad_(False)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_of_the_vocabulary_stands_for_the_rest(family, monkeypatch):
    """As if each drawn token were there as often as it counts."""
    monkeypatch.setattr(_loss, "DRAWN_TOKENS", 50)
    student, teacher = frozen_double(family, 0), frozen_double(family, 1)
    sample = sample_vocabulary(student, [text_of_a_batch()], 0)
    assert sample is not None
    size, in_text = student.config.vocab_size, set(batch()[0].flatten().tolist())
    counts = dict(zip(sample.tokens.tolist(), sample.log_counts.exp().tolist(), strict=True))
    assert all(counts[token] == 1 for token in in_text)
    assert len(counts) == len(in_text) + 50
    assert sum(counts.values()) == pytest.approx(size, rel=1e-6)
    tokens, mask, labels = batch()

    def sampled(model: PreTrainedModel) -> Tensor:
        return model(tokens, attention_mask=mask).logits[..., sample.tokens] + MIXED.temperature * sample.log_counts

    objective = Objective((0, 0, 0), MIXED.temperature)
    with torch.no_grad():
        taught = sampled(teacher)
    # Labels have no weight.
    expected = naive_loss(sampled(student), taught, labels.clamp_max(0).where(labels == -100, 0), objective)
    expected_gradients = gradients(expected, student)
    loss = our_loss(student, teacher, objective, sample=sample)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    ours = gradients(loss, student)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-7, msg=name)


def test_samples_of_the_vocabulary_have_the_divergence_over_all(monkeypatch):
    """On average, but for the part of one in the number of drawn tokens that count."""
    monkeypatch.setattr(_loss, "DRAWN_TOKENS", 100)
    student, teacher = frozen_double("llama", 0), frozen_double("llama", 1)
    with torch.no_grad():
        whole = our_loss(student, teacher, Objective((0, 0, 0)))
        losses = []
        for seed in range(20):
            sample = sample_vocabulary(student, [text_of_a_batch()], seed)
            losses.append(our_loss(student, teacher, Objective((0, 0, 0)), sample=sample))
    assert float(torch.stack(losses).mean()) == pytest.approx(float(whole), rel=0.1)
    assert float(torch.stack(losses).std()) > 0


def test_all_of_the_vocabulary_is_used_where_a_sample_would_not_do(monkeypatch):
    monkeypatch.setattr(_loss, "DRAWN_TOKENS", 50)
    student, text = frozen_double("llama", 0), text_of_a_batch()
    assert sample_vocabulary(student, [text], 0) is not None
    assert sample_vocabulary(student, [text, text_of_a_batch(0.5)], 0) is None
    assert sample_vocabulary(double("llama", 0), [text], 0) is None
    monkeypatch.setattr(_loss, "DRAWN_TOKENS", 256)
    assert sample_vocabulary(student, [text], 0) is None


def test_a_gradient_that_is_passed_on_is_multiplied():
    student = double("llama", 0)
    once = gradients(our_loss(student, None, LABELS), student)
    half = gradients(our_loss(student, None, LABELS) / 2, student)
    assert all(torch.equal(half[name], gradient / 2) for name, gradient in once.items())


def test_below_adapters_the_head_gets_no_gradient():
    student, teacher = double("llama", 0), double("llama", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = with_adapters(student, RecoveryOptions(train="ia3")).double()
    objective = MIXED
    tokens, mask, labels = batch()
    with torch.no_grad():
        taught = teacher(tokens, attention_mask=mask).logits
    expected = gradients(naive_loss(adapted(tokens, attention_mask=mask).logits, taught, labels, objective), adapted)
    ours = gradients(our_loss(student, teacher, objective), adapted)
    assert ours.keys() == expected.keys()
    assert all("ia3" in name for name in ours)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-7)


def test_a_student_that_predicts_what_the_teacher_does_has_nothing_to_learn():
    student = double("llama", 0).float()
    loss = our_loss(student, student, Objective((0, 0, 0), 1.5))
    assert abs(float(loss.detach())) < 1e-5
    assert max(float(gradient.abs().max()) for gradient in gradients(loss, student).values()) < 1e-4


def test_a_batch_without_learnt_tokens_has_no_loss():
    student = double("llama", 0)
    loss = our_loss(student, None, LABELS, torch.full((3, 12), -100))
    assert float(loss.detach()) == 0
    assert not any(gradient.any() for gradient in gradients(loss, student).values())


class _LargestLogits(TorchDispatchMode):
    """The most rows of a tensor as wide as the vocabulary that any operation made."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        made = operation(*arguments, **(named or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return made


def test_no_tensor_has_the_logits_of_more_than_some_rows(monkeypatch):
    monkeypatch.setattr(_loss, "PREDICTIONS_AT_ONCE", 70)  # more than the width of the head, whose transpose is as wide
    student, teacher = double("llama", 0), double("llama", 1)
    tokens = torch.randint(5, 60, (4, 60))
    with _LargestLogits(student.config.vocab_size) as largest:
        ours, theirs = Predictor(student), Predictor(teacher)
        with torch.no_grad():
            taught = theirs.hidden_states(tokens, torch.ones_like(tokens))
        hidden = ours.hidden_states(tokens, torch.ones_like(tokens))
        weights = torch.full((4,), 0.5)
        loss_of_batch(ours, hidden, tokens, weights, teacher=theirs, taught=taught).backward()
    assert largest.rows == 70


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("known", [1, 8, 256])
def test_of_a_teacher_its_most_probable_tokens_suffice(known, temperature):
    """The divergence over these and the class of all others, and its gradient; over all tokens, the full divergence."""
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(6, 256, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    labels, weights = torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.float64)
    taught = (teacher / temperature).log_softmax(-1)
    top = taught.topk(known, -1)
    filled = fill_teacher(student.detach(), top.indices, top.values, temperature)
    loss, gradient = loss_and_gradient(student.detach(), filled, labels, weights, temperature)
    predicted = (student / temperature).log_softmax(-1)
    classes = [
        [
            log.gather(-1, top.indices).exp(),
            (1 - log.gather(-1, top.indices).exp().sum(-1, keepdim=True)).clamp_min(1e-30),
        ]
        for log in (taught, predicted)
    ]
    of_teacher, of_student = (torch.cat(pair, -1) for pair in classes)
    expected = temperature**2 * (of_teacher * (of_teacher.log() - of_student.log())).sum()
    torch.testing.assert_close(loss, expected.detach())
    (of_expected,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, of_expected)
    if known == 256:
        torch.testing.assert_close(loss, loss_and_gradient(student.detach(), teacher, labels, weights, temperature)[0])
