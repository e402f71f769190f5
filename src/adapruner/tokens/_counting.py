"""Which tokens text has, and in which scripts tokens are written."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

# Characters that are encoded at once: long enough that its ends do not matter, short enough for any memory.
_CHARACTERS_AT_ONCE = 1 << 17


def count_tokens(
    tokenizer: Tokenizer, documents: Iterable[str], size: int, progress: Callable[[int], None] | None = None
) -> tuple[Tensor, int]:
    """How often text has each token. Documents are joined by an empty line, as where text is evaluated.

    Args:
        size: ids from here on are not counted.
        progress: called with the number of documents read.

    Returns:
        [size], int64; and the bytes of the text in UTF-8.
    """
    counts, read = torch.zeros(size, dtype=torch.int64), 0
    for text, number in _chunks(documents):
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
        counts += torch.bincount(tokens[tokens < size], minlength=size)
        read += len(text.encode())
        if progress:
            progress(number)
    return counts, read


def _chunks(documents: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Documents joined until they are long enough, with how many they are."""
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


def script_of(text: str) -> str:
    """The script of the first letter of a text: the first word of its name in Unicode, as LATIN or CJK; OTHER without
    letters."""
    return next((script for sign in text if (script := _script(sign))), "OTHER")


@lru_cache(maxsize=1 << 16)
def _script(sign: str) -> str | None:
    return unicodedata.name(sign, "").partition(" ")[0] if sign.isalpha() else None


def scripts_of(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[str]:
    """The script of every token; parts of characters have none and are OTHER."""
    return [script_of(text) for text in tokenizer.batch_decode([[token] for token in tokens])]


def foreign_tokens(tokenizer: Tokenizer, size: int, used: Iterable[int]) -> dict[str, int]:
    """How many tokens are written in each script that a text has no letter of; the most frequent script first.

    Args:
        size: of the vocabulary; ids from here on do not count.
        used: the tokens of the text.
    """
    found = set(scripts_of(tokenizer, set(used))) | {"OTHER"}
    counts: dict[str, int] = {}
    for script in scripts_of(tokenizer, range(min(size, len(tokenizer)))):
        if script not in found:
            counts[script] = counts.get(script, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
