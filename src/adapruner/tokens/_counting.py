"""The frequency of tokens in text, and the scripts of tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._tokenizing import tokens_of

# Characters that are encoded at once: long enough that its ends do not matter, short enough for any memory.
_CHARACTERS_AT_ONCE = 1 << 17


def count_tokens(
    tokenizer: Tokenizer, documents: Iterable[str], size: int, progress: Callable[[int], None] | None = None
) -> tuple[Tensor, int]:
    """The frequency of each token in text. Documents are joined by an empty line, as in evaluations.

    Args:
        size: only smaller ids are counted.
        progress: called with the number of documents read.

    Returns:
        [size], int64; and the bytes of the text in UTF-8.
    """
    counts, read = torch.zeros(size, dtype=torch.int64), 0
    for text, number in _chunks(documents):
        tokens = tokens_of(tokenizer, text)
        counts += torch.bincount(tokens[tokens < size], minlength=size)
        read += len(text.encode())
        if progress:
            progress(number)
    return counts, read


def _chunks(documents: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Documents joined until they are long enough, with their number."""
    joined: list[str] = []
    length = 0
    for document in documents:
        joined.append(document)
        length += len(document)
        if length >= _CHARACTERS_AT_ONCE:
            yield "\n\n".join(joined) + "\n\n", len(joined)
            joined, length = [], 0
    if joined:
        yield "\n\n".join(joined), len(joined)


@lru_cache(maxsize=1 << 16)
def _script(sign: str) -> str | None:
    return unicodedata.name(sign, "").partition(" ")[0] if sign.isalpha() else None


def scripts_of(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[str]:
    """The script of every token: the first word of the Unicode name of its first letter, as LATIN or CJK; OTHER without
    letters, as for parts of characters."""
    texts = tokenizer.batch_decode([[token] for token in tokens])
    return [next((script for sign in text if (script := _script(sign))), "OTHER") for text in texts]
