"""Signs that a model is broken, which perplexity on prose does not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.evaluation._perplexity import Perplexity

# Tokens of every continuation, and of the pieces that are looked for in it.
_CONTINUED, _PIECE = 64, 4
REPETITION_PROTOCOL = (
    f"greedy continuations of {_CONTINUED} tokens, fraction of pieces of {_PIECE} tokens that were there before"
)
AGREEMENT_PROTOCOL = (
    f"along the dense model's greedy continuations of {_CONTINUED} tokens, fraction of tokens that this model predicts"
    " too"
)


class Breakage(BaseModel):
    """Signs of a broken model, to be compared with those of the dense model.

    Attributes:
        repetition: the fraction of pieces of 4 tokens in greedy continuations that occurred before in the same
            continuation (seq-rep-4 of Welleck et al., arXiv 1908.04319), mean over some openings; None if it was not
            measured.
        agreement: the fraction of the tokens of the dense model's greedy continuations that this model predicts too,
            given the tokens before; 1 for the dense model; None if it was not measured.
        texts: perplexity and bits per byte of text that is not prose, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    repetition: float | None
    agreement: float | None = None
    texts: dict[str, Perplexity]


def continue_greedily(model: PreTrainedModel, tokenizer: Tokenizer, openings: Sequence[str]) -> Tensor:
    """Beginnings of texts, each followed by the 64 tokens with which a model continues it; the end token is forbidden.

    Args:
        openings: cut to the length of the shortest, so that none is padded.

    Returns:
        [openings, tokens], int64.
    """
    tokens = tokenizer(list(openings)).input_ids
    shortest = min(map(len, tokens))
    prompts = torch.tensor([opening[:shortest] for opening in tokens], device=model.device)
    generate: Any = model.generate
    continued: Tensor = generate(
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
    return continued.cpu()


def repetition(continued: Tensor) -> float:
    """The fraction of repeated pieces in continuations; see `Breakage`.

    Args:
        continued: [openings, tokens], int64, see `continue_greedily`.
    """
    fractions = []
    for tokens in continued[:, -_CONTINUED:].tolist():
        pieces = [tuple(tokens[first : first + _PIECE]) for first in range(len(tokens) - _PIECE + 1)]
        fractions.append(1 - len(set(pieces)) / len(pieces))
    return sum(fractions) / len(fractions)


@torch.no_grad()
def agreement(model: PreTrainedModel, continued: Tensor) -> float:
    """The fraction of the tokens of another model's continuations that a model predicts; see `Breakage`.

    Args:
        continued: [openings, tokens], int64, see `continue_greedily`.
    """
    logits = model(input_ids=continued.to(model.device), use_cache=False).logits[:, -_CONTINUED - 1 : -1]
    # The end token was forbidden. Configs of small models may name one that their vocabulary does not have.
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    logits[..., [end for end in ends if end is not None and 0 <= end < logits.shape[-1]]] = -torch.inf
    chosen: Tensor = logits.argmax(-1).cpu()
    return float((chosen == continued[:, -_CONTINUED:]).double().mean())
