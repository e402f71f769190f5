"""What a model can still do: how it reads what the original wrote, and built-in tasks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._mix import kinds, write_kinds
from adapruner.calibration._probes import probe_texts, prompts_to_show
from adapruner.calibration._tokenizing import tokenize
from adapruner.evaluation._choices import solve
from adapruner.evaluation._continuations import Text, read
from adapruner.evaluation._losses import window_losses
from adapruner.models._generation import NO_TOKEN, continue_texts, end_tokens
from adapruner.models._layers import is_streamed

# Of each kind that the original writes.
_ANSWER_WINDOWS, _ANSWER_TOKENS = 5, 128
# Tokens of each text that is shown.
_SHOWN_TOKENS = 96

# By kind of text, the windows that models read, [windows, tokens], int64; and under the name of a kind and `/predicted`
# the tokens that the original predicts in them, [windows, tokens - 1].
Answers = dict[str, Tensor]
_PREDICTED = "/predicted"


class Reading(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """How a model reads text of a kind that the original wrote.

    Attributes:
        loss: the mean negative log-likelihood in nats per token of the original.
        agreement: the fraction of tokens at which the model and the original predict the same; 1 for the original;
            None layer by layer, or if their tokens differ.
    """

    loss: float
    agreement: float | None


class Abilities(BaseModel, extra="forbid", frozen=True):
    """What a model can do, to be compared with what the original can.

    Attributes:
        reads: by kind of text.
        solved: by built-in task, a digit for every item: 1 if it is solved. Empty layer by layer.
        writes: greedy texts by their prompt, to be read by people. Empty layer by layer.
    """

    reads: dict[str, Reading]
    solved: dict[str, str]
    writes: dict[str, str]

    @property
    def share_solved(self) -> float | None:
        """The fraction of the items of all tasks."""
        items = "".join(self.solved.values())
        return items.count("1") / len(items) if items else None


def number_of_answers() -> int:
    """The number of windows that a model writes."""
    return len(kinds()) * _ANSWER_WINDOWS


def write_answers(
    original: PreTrainedModel,
    tokenizer: Tokenizer,
    advance: Callable[[float], None] | None = None,
    positions: int | None = None,
) -> Answers:
    """Text of every kind of `mix` that the original writes, with random numbers and functions of the standard library
    that calibration does not use; layer by layer, where every token would read all weights, the built-in texts.

    Args:
        advance: called with fractions of the number of windows.
        positions: of the model that also reads the text, if it may have fewer.
    """
    tokens = min(filter(None, (_ANSWER_TOKENS, positions, getattr(original.config, "max_position_embeddings", None))))
    if is_streamed(original):
        return {name: text.windows for name, text in probe_texts(tokenizer, tokens).items()}
    counts = dict.fromkeys(kinds(), _ANSWER_WINDOWS)
    written = write_kinds(original, tokenizer, counts, tokens, "report", 0, end_tokens(original, tokenizer), advance)
    # The tokenizer may not serve a kind.
    answers = {kind: windows for kind, windows in written.items() if len(windows)}
    return answers | {
        kind + _PREDICTED: torch.stack([predicted for _, predicted in read(original, _texts(windows))])
        for kind, windows in answers.items()
    }


def windows_of(answers: Answers) -> dict[str, Tensor]:
    """The windows by kind."""
    return {name: tensor for name, tensor in answers.items() if not name.endswith(_PREDICTED)}


def _texts(windows: Tensor) -> list[Text]:
    return [Text(window[:1], window[1:]) for window in windows.tolist()]


def measure_abilities(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    answers: Answers,
    tokenizer_of_answers: Tokenizer | None = None,
    advance: Callable[[int], None] | None = None,
) -> Abilities:
    """Measures what a model can do.

    Args:
        answers: of the original, see `write_answers`.
        tokenizer_of_answers: of the original, if its tokens are others.
        advance: called with the number of windows done.
    """
    reads = {}
    for kind, windows in windows_of(answers).items():
        predicted = answers.get(kind + _PREDICTED)
        if tokenizer_of_answers:
            texts = tokenizer_of_answers.batch_decode(windows)
            own = [_as_text(tokenizer, text) for text in texts]
            losses = torch.cat([losses for losses, _ in read(model, own)])
            reads[kind] = Reading(loss=float(losses.double().sum()) / windows[:, 1:].numel(), agreement=None)
        elif is_streamed(model):
            reads[kind] = Reading(loss=float(window_losses(model, windows).mean()), agreement=None)
        else:
            losses, chosen = (torch.stack(both) for both in zip(*read(model, _texts(windows)), strict=True))
            agreed = None if predicted is None else float((chosen == predicted).double().mean())
            reads[kind] = Reading(loss=float(losses.double().mean()), agreement=agreed)
        if advance:
            advance(len(windows))
    if is_streamed(model):
        return Abilities(reads=reads, solved={}, writes={})
    return Abilities(reads=reads, solved=solve(model, tokenizer), writes=write(model, tokenizer))


def _as_text(tokenizer: Tokenizer, text: str) -> Text:
    first, *others = tokenize(tokenizer, text, add_special_tokens=False).input_ids
    return Text([first], others)


def write(model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, str]:
    """Greedy texts after a few prompts, which are cut on the left where the model has few positions."""
    prompts = prompts_to_show(tokenizer)
    room = getattr(model.config, "max_position_embeddings", None) or 2 * _SHOWN_TOKENS
    tokens = [prompt[-(room // 2) :] for prompt in prompts.values()]
    longest = max(map(len, tokens))
    new_tokens, ends = min(_SHOWN_TOKENS, room - longest), end_tokens(model, tokenizer)
    written = continue_texts(model, tokens, new_tokens, torch.zeros(len(tokens)), seed=0, ends=ends)[:, longest:]
    return {
        prompt: str(tokenizer.decode(row[row != NO_TOKEN], skip_special_tokens=True))
        for prompt, row in zip(prompts, written, strict=True)
    }
