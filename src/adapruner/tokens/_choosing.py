"""Choosing the tokens that are kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from pydantic import BaseModel
from torch import Tensor

from adapruner.errors import AdaPrunerError
from adapruner.tokens._tokenizer import TokenizerParts


class VocabularySummary(BaseModel, extra="forbid", frozen=True):
    """The outcome of pruning a vocabulary.

    Attributes:
        before, after: the number of tokens, which is that of the rows of the embedding.
        occurring: the number of different tokens in the text.
        counted_bytes: the length of the text in UTF-8.
        scripts: the number of tokens before and after, by script.
        parameters_before, parameters_after: of the model, tied ones counted once, before anything else is removed.
    """

    before: int
    after: int
    occurring: int
    counted_bytes: int
    scripts: dict[str, tuple[int, int]]
    parameters_before: int
    parameters_after: int

    @property
    def removed_parameters(self) -> int:
        return self.parameters_before - self.parameters_after

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        return (
            f"{self.after:,} of {self.before:,} tokens were kept: the most frequent of the {self.occurring:,} in"
            f" {self.counted_bytes / 1e6:,.1f} MB of text, what they are merged from, bytes, and special tokens."
        )


@dataclass(frozen=True)
class Vocabulary:
    """The kept tokens.

    Attributes:
        kept: their ids, ascending; the new id of a token is its place in this list.
        beyond: ids of added tokens that have no row in the embedding, ascending; their new ids follow those of the kept
            tokens.
    """

    kept: tuple[int, ...]
    beyond: tuple[int, ...] = ()

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """The new ids, by old id."""
        return {old: new for new, old in enumerate((*self.kept, *self.beyond))}


def choose_tokens(
    parts: TokenizerParts,
    counts: Tensor,
    named: Iterable[int],
    size: int | None = None,
    multiple: int = 64,
) -> tuple[int, ...]:
    """The tokens of a text, the tokens that they are merged from, and the tokens that every text needs; ascending.

    Rounding up adds tokens that the text does not have, smallest ids first: training the tokenizer found these first.

    Args:
        counts: [rows of the embedding], int64, see `count_tokens`.
        named: tokens that configs name.
        size: the largest number of kept tokens, rounded up; the most frequent ones are kept.
        multiple: the number of kept tokens is rounded up to a multiple of this, if there are enough tokens.

    Raises:
        AdaPrunerError: `size` does not suffice for what must be kept.
    """
    rows = len(counts)
    chosen: set[int] = set()
    for token in parts.required | set(named):
        chosen |= {ancestor for ancestor in parts.with_ancestors(token) if ancestor < rows}
    if size is not None and size < len(chosen):
        raise AdaPrunerError(
            f"`vocabulary_size` {size:,} is less than the {len(chosen):,} tokens that must be kept (special and added"
            " tokens, bytes or characters, and what these are merged from): choose at least that"
        )
    most = rows if size is None else _rounded_up(size, multiple)
    occurring = counts.nonzero().flatten()
    by_frequency = occurring[counts[occurring].argsort(descending=True, stable=True)].tolist()
    _take(chosen, by_frequency, parts, most)
    _take(chosen, sorted(index for index in parts.texts if index < rows), parts, _rounded_up(len(chosen), multiple))
    unused = [row for row in range(max(parts.texts) + 1, rows) if row not in chosen]
    return tuple(sorted(chosen.union(unused[: min(_rounded_up(len(chosen), multiple), rows) - len(chosen)])))


def _take(chosen: set[int], tokens: Iterable[int], parts: TokenizerParts, most: int) -> None:
    """Adds tokens with those that they are merged from, up to a number; a token that does not fit is skipped."""
    for token in tokens:
        if len(chosen) >= most:
            return
        added = parts.with_ancestors(token) - chosen
        if len(chosen) + len(added) <= most:
            chosen |= added


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
