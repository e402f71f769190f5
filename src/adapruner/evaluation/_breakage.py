"""Signs that a model is broken, which perplexity on prose does not show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from statistics import fmean

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._pool import EvaluationText
from adapruner.calibration._probes import Question, prompts, questions
from adapruner.calibration._tokenizing import tokenize
from adapruner.evaluation._perplexity import Perplexity, measure_perplexity
from adapruner.evaluation._writing import WRITING_PROTOCOL, Text, Written, read, texts_of

# Tokens of the pieces that are looked for in what models write.
_PIECE = 4
# By the name of a sign.
PROTOCOLS_OF_SIGNS = {
    "agreement": "fraction of the tokens that the dense model writes which this model predicts too",
    "repetition": f"fraction of pieces of {_PIECE} tokens that were there before in the same text, mean",
    "distinct pieces": f"number of different pieces of {_PIECE} tokens in all texts, divided by that of all",
    "ended": f"fraction of texts that the model ends itself ({WRITING_PROTOCOL})",
    "loss of dense": "nats per token of the dense model on these texts",
    "answered": "fraction of built-in questions whose right answer is the most likely of the choices",
}
# The texts that the verdict is about.
_JUDGED, _JUDGED_SAMPLES = "openings, greedy", "openings, sampled"


class Writing(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """Signs of the texts that a model wrote after prompts of one kind, in one way.

    Attributes:
        repetition: the fraction of pieces of 4 tokens that occurred before in the same text (seq-rep-4 of Welleck et
            al., arXiv 1908.04319), mean over the texts that have a piece.
        distinct: the number of different pieces of 4 tokens in all texts together, divided by the number of all pieces
            (distinct-n of Li et al., arXiv 1510.03055, with n = 4).
        ended: the fraction of texts that end before the limit of tokens.
        loss_of_dense: the mean negative log-likelihood of sampled texts for the dense model, in nats per token; None if
            its tokens are others, and for greedy texts, whose loops are likely for every model.
        texts: what was written, by prompt.
    """

    repetition: float
    distinct: float
    ended: float
    loss_of_dense: float | None
    texts: dict[str, str]


class Breakage(BaseModel, extra="forbid", frozen=True):
    """Signs of a broken model, to be compared with those of the dense model.

    Attributes:
        agreement: the fraction of the tokens of the dense model's greedy continuations of openings that this model
            predicts too, given the tokens before; 1 for the dense model; None if it was not measured.
        texts: perplexity and bits per byte of built-in texts, by name.
        writing: signs of what the model wrote, by the kind of prompts and the way of writing, such as `openings,
            greedy`; empty if it wrote nothing.
        answered: the fraction of built-in questions to which the right answer is more likely than the others; None if
            it was not measured.
    """

    agreement: float | None = None
    texts: dict[str, Perplexity]
    writing: dict[str, Writing] = {}
    answered: float | None = None

    @property
    def repetition(self) -> float | None:
        """That of the greedy continuations of openings, on which the verdict rests; None if there are none."""
        return self.writing[_JUDGED].repetition if _JUDGED in self.writing else None

    @property
    def loss_of_dense(self) -> float | None:
        """That on the sampled continuations of openings, on which the verdict rests; None if there are none, or the
        tokens of the dense model are others."""
        return self.writing[_JUDGED_SAMPLES].loss_of_dense if _JUDGED_SAMPLES in self.writing else None


def judge_writing(
    tokenizer: Tokenizer, written: Written, ends: Sequence[int], dense: PreTrainedModel | None
) -> dict[str, Writing]:
    """Signs of what a model wrote, by the way of writing.

    Args:
        ends: the tokens that end a text, see `end_tokens`.
        dense: reads what was written; None if its tokens are others.
    """
    asked, signs = prompts(tokenizer), {}
    for way, tokens in written.items():
        texts = texts_of(tokens)
        pieces = [[*zip(*(text.continuation[first:] for first in range(_PIECE)), strict=False)] for text in texts]
        repeated = [1 - len(set(of_text)) / len(of_text) for of_text in pieces if of_text]
        together = [piece for of_text in pieces for piece in of_text]
        signs[way] = Writing(
            repetition=fmean(repeated or [0.0]),
            distinct=len(set(together)) / max(1, len(together)),
            ended=fmean(text.continuation[-1] in ends for text in texts),
            loss_of_dense=float(torch.cat([losses for losses, _ in read(dense, texts)]).double().mean())
            if dense and way.endswith("sampled")
            else None,
            texts={
                prompt: str(tokenizer.decode(text.continuation, skip_special_tokens=True))
                for prompt, text in zip(asked[way.partition(",")[0]], texts, strict=True)
            },
        )
    return signs


def measure_breakage(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    texts: Mapping[str, EvaluationText],
    writing: dict[str, Writing],
    written_by_dense: Written | None,
    progress: Callable[[int], None] | None = None,
) -> Breakage:
    """Measures signs that a model is broken.

    Args:
        texts: built-in texts (`calibration.probe_texts`).
        writing: of what this model wrote; empty where every token would read all weights, so that no questions are
            asked either.
        written_by_dense: None if this is the dense model; empty if its tokens are others.
        progress: called with the number of windows done after each batch.
    """
    agreed = 1.0 if writing and written_by_dense is None else None
    if written_by_dense:
        of_dense = texts_of(written_by_dense[_JUDGED])
        predicted = torch.cat([chosen for _, chosen in read(model, of_dense)])
        agreed = float((predicted == torch.cat([torch.tensor(text.continuation) for text in of_dense])).double().mean())
    return Breakage(
        agreement=agreed,
        texts={
            name: measure_perplexity(model, text.windows, name, progress, **text.about) for name, text in texts.items()
        },
        writing=writing,
        answered=share_answered(model, tokenizer, questions()) if writing else None,
    )


def share_answered(model: PreTrainedModel, tokenizer: Tokenizer, questions: Sequence[Question]) -> float:
    """The fraction of questions to which the right answer is more likely than each of the others."""
    answers = []
    for question, choices in questions:
        prompt = f"Question: {question}\nAnswer:"
        before = tokenize(tokenizer, prompt).input_ids
        for choice in choices:
            tokens = tokenize(tokenizer, f"{prompt} {choice}").input_ids
            # Some tokenizers put a token behind every text.
            place = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, tokens, strict=False)))
            answers.append(Text(tokens[:place], tokens[place:]))
    losses = iter([float(losses.sum()) for losses, _ in read(model, answers)])
    right = 0
    for _, choices in questions:
        first, *others = [next(losses) for _ in choices]
        right += first < min(others)
    return right / len(questions)
