"""Tokens of text, however long it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase as Tokenizer

from adapruner.models._places import reported

# A longer text is tokenized in pieces: an encoding needs up to 300 bytes for each character.
_MOST_CHARACTERS, _OF_A_PIECE = 1 << 22, 1 << 18


def tokenize(tokenizer: Tokenizer, text: str | list[str], **options: Any) -> BatchEncoding:
    """The encoding of a text, or of several.

    Raises:
        AdaPrunerError: the tokenizer fails on it, for example because a pattern backtracks without end.
    """
    with reported(f"the tokenizer {tokenizer.name_or_path} fails on a text"):
        # A text may be longer than those of the model.
        encoding: BatchEncoding = tokenizer(
            text, verbose=False, return_attention_mask=False, return_token_type_ids=False, **options
        )
    return encoding


def tokens_of(tokenizer: Tokenizer, text: str, special: bool = False) -> Tensor:
    """[tokens], int64: the tokens of a text, with the special ones that the tokenizer adds if `special`."""
    return torch.cat([tokens for tokens, _ in _encodings(tokenizer, text, special, with_ends=False)])


def tokens_with_ends(tokenizer: Tokenizer, text: str, special: bool = False) -> tuple[Tensor, Tensor]:
    """[tokens], int64: `tokens_of` a fast tokenizer, and the number of characters up to the end of each; 0 for special
    tokens."""
    tokens, ends = zip(*_encodings(tokenizer, text, special, with_ends=True), strict=True)
    return torch.cat(tokens), torch.cat(ends)


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts in front of a text."""
    text = "a"
    tokens = tokenize(tokenizer, text).input_ids
    bare = tokenize(tokenizer, text, add_special_tokens=False).input_ids
    length = next((first for first in range(len(tokens)) if tokens[first : first + len(bare)] == bare), 0)
    return list(tokens[:length])


def _encodings(tokenizer: Tokenizer, text: str, special: bool, with_ends: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens and ends of each piece of a text; no ends where they are not wanted."""
    read, is_whole = 0, len(text) <= _MOST_CHARACTERS
    if special and not is_whole:
        start = torch.tensor(start_tokens(tokenizer), dtype=torch.int64)
        yield start, torch.zeros_like(start)
    for piece in _pieces(text):
        encoding = tokenize(tokenizer, piece, add_special_tokens=special and is_whole, return_offsets_mapping=with_ends)
        offsets = torch.tensor(encoding.offset_mapping if with_ends else [], dtype=torch.int64).view(-1, 2)
        yield torch.tensor(encoding.input_ids, dtype=torch.int64), offsets[:, 1] + read
        read += len(piece)


def _pieces(text: str) -> Iterator[str]:
    """Consecutive parts of a text, which end before a space or a line end if there is one."""
    start, characters = 0, len(text) if len(text) <= _MOST_CHARACTERS else _OF_A_PIECE
    while len(text) - start > characters:
        most = start + characters
        end = max(text.rfind(sign, start + 1, most) for sign in " \n")
        end = most if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]
