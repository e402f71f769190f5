"""Text that models write: greedy and sampled continuations, and the predictions of a model for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._probes import prompts
from adapruner.evaluation._losses import tokens_per_batch
from adapruner.models._generation import NO_TOKEN, continue_texts

# The most tokens of every continuation.
_CONTINUED = 128
_TEMPERATURE = 0.7
WRITING_PROTOCOL = f"at most {_CONTINUED} tokens, greedy or sampled at temperature {_TEMPERATURE}"

# Texts by the kind of their prompts and the way of writing, such as `openings, greedy`: [texts, tokens], int64. The
# last `_CONTINUED` columns are what the model wrote, up to and including a token that ends the text.
Written = dict[str, Tensor]


class Text(NamedTuple):
    """The tokens of a prompt and of its continuation."""

    prompt: list[int]
    continuation: list[int]


def write(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    progress: Callable[[float], None] | None = None,
    positions: int | None = None,
) -> Written:
    """The texts that a model writes after the built-in prompts (`calibration.prompts`).

    Prompts are padded on the left. Where there are few positions, prompts take at most half of them, from which they
    are cut on the left, and continuations end with the last position.

    Args:
        progress: called with fractions of the number of texts (see `number_of_texts`).
        positions: of the model that reads the texts, if it may have fewer.

    Returns:
        The same for the same model on the same machine; of its generation settings, only the end tokens count.
    """
    asked = prompts(tokenizer)
    tokens = [prompt for by_text in asked.values() for prompt in by_text.values()]
    new_tokens = _CONTINUED
    if room := min(filter(None, (positions, getattr(model.config, "max_position_embeddings", None))), default=None):
        tokens = [prompt[-(room // 2) :] for prompt in tokens]
        new_tokens = min(new_tokens, room - max(map(len, tokens)))
    temperatures = torch.tensor([0.0, _TEMPERATURE]).repeat_interleave(len(tokens))
    continued = continue_texts(
        model, tokens * 2, new_tokens, temperatures, seed=0, ends=end_tokens(model, tokenizer), advance=progress
    )
    greedy, sampled = functional.pad(continued, (0, _CONTINUED - new_tokens), value=NO_TOKEN).chunk(2)
    counts = [len(by_text) for by_text in asked.values()]
    return {
        f"{kind}, {way}": texts.clone()
        for way, written in (("greedy", greedy), ("sampled", sampled))
        for kind, texts in zip(asked, written.split(counts), strict=True)
    }


def number_of_texts(tokenizer: Tokenizer) -> int:
    """The number of texts that `write` writes."""
    return 2 * sum(map(len, prompts(tokenizer).values()))


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text, for the tokenizer or in the generation settings of the model."""
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    # Configs of small models may name one that their vocabulary does not have.
    return sorted(end for end in ends if end is not None and 0 <= end < model.config.vocab_size)


def texts_of(written: Tensor) -> list[Text]:
    """The texts without padding."""
    halves = written[:, :-_CONTINUED], written[:, -_CONTINUED:]
    tokens = ([row[row != NO_TOKEN].tolist() for row in half] for half in halves)
    return [Text(*pair) for pair in zip(*tokens, strict=True)]


@torch.inference_mode()
def read(model: PreTrainedModel, texts: Sequence[Text]) -> list[tuple[Tensor, Tensor]]:
    """For every token of each continuation, given all tokens before: the negative log-likelihood in nats, float32, and
    the token that the model predicts, int64.

    Rows are padded on the right, which needs no mask, and cut on the left where the model has few positions. Texts that
    differ in their last token alone are one row.
    """
    room = getattr(model.config, "max_position_embeddings", None) or 0
    texts_of_row: dict[tuple[int, ...], list[int]] = {}
    for number, (prompt, continuation) in enumerate(texts):
        texts_of_row.setdefault((*prompt, *continuation[:-1])[-room:], []).append(number)
    rows = sorted(texts_of_row, key=len, reverse=True)
    readings: dict[int, tuple[Tensor, Tensor]] = {}
    while rows:
        at_once = max(1, tokens_per_batch(model.device) // len(rows[0]))
        batch, rows = rows[:at_once], rows[at_once:]
        tokens = torch.tensor([(*row, *[0] * (len(batch[0]) - len(row))) for row in batch], device=model.device)
        numbers = [number for row in batch for number in texts_of_row[row]]
        written = [torch.tensor(texts[number].continuation, dtype=torch.long) for number in numbers]
        lengths = [len(continuation) for continuation in written]
        predicted = model(input_ids=tokens, use_cache=False).logits
        targets = iter(torch.cat(written).to(predicted.device).split(lengths))
        losses, chosen = [], []
        # Text by text: float32 logits of a batch are the largest thing in memory.
        for row, logits in zip(batch, predicted, strict=True):
            for _ in texts_of_row[row]:
                target = next(targets)
                predictions = logits[len(row) - len(target) : len(row)].float()
                losses.append(functional.cross_entropy(predictions, target, reduction="none"))
                chosen.append(predictions.argmax(-1))
        both = (torch.cat(parts).cpu().split(lengths) for parts in (losses, chosen))
        readings |= dict(zip(numbers, zip(*both, strict=True), strict=True))
    return [readings[number] for number in range(len(texts))]
