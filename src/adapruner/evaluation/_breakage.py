"""Whether a model still works: what perplexity on prose does not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.evaluation._perplexity import Perplexity

# Tokens of every continuation, and of the pieces that are looked for in it.
_CONTINUED, _PIECE = 64, 4
REPETITION_PROTOCOL = (
    f"greedy continuations of {_CONTINUED} tokens, fraction of pieces of {_PIECE} tokens that were there before"
)


class Breakage(BaseModel):
    """Signs of a broken model, to be compared with those of the dense model.

    Attributes:
        repetition: of the greedy continuations of some openings, the fraction of pieces of 4 tokens that were there
            before in the same continuation (seq-rep-4 of Welleck et al., arXiv 1908.04319), mean over the openings;
            None where it was not measured.
        texts: perplexity and bits per byte of text that is not prose, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    repetition: float | None
    texts: dict[str, Perplexity]


def measure_repetition(model: PreTrainedModel, tokenizer: Tokenizer, openings: Sequence[str]) -> float:
    """How much a model repeats itself; see `Breakage`.

    Args:
        openings: beginnings of texts, each of which the model continues by 64 tokens; cut off where the shortest ends,
            so that none is padded.
    """
    tokens = tokenizer(list(openings)).input_ids
    shortest = min(map(len, tokens))
    prompts = torch.tensor([own[:shortest] for own in tokens], device=model.device)
    generate: Any = model.generate
    continued = generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=_CONTINUED,
        max_new_tokens=_CONTINUED,
        pad_token_id=0,
    )
    return sum(map(_repeated, continued[:, shortest:].tolist())) / len(tokens)


def _repeated(tokens: Sequence[int]) -> float:
    """The fraction of pieces that were there before."""
    pieces = [tuple(tokens[first : first + _PIECE]) for first in range(len(tokens) - _PIECE + 1)]
    return 1 - len(set(pieces)) / len(pieces)
