"""From texts to the tokens that a model keeps: counting, choosing, and the scripts of tokens."""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.model.architecture import new_model
from adapruner.structure.blocks import count_parameters
from adapruner.text.reading import stream_documents
from adapruner.text.sources import Source
from adapruner.text.windows import tokens_of
from adapruner.tokens.model import Vocabulary, cut_config, named_tokens
from adapruner.tokens.tokenizer import TokenizerParts

# Characters that are encoded at once: long enough that its ends do not matter, short enough for any memory.
_CHARACTERS_AT_ONCE = 1 << 17


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


def select_vocabulary(
    tokenizer: Tokenizer,
    config: PreTrainedConfig,
    naming: Iterable[PreTrainedConfig | GenerationConfig],
    sources: Sequence[Source],
    size: int | None,
    multiple: int,
    progress: Callable[[int], None],
) -> tuple[Vocabulary, VocabularySummary]:
    """Counts the tokens of texts and chooses the tokens that a model keeps; reads no weights.

    Args:
        naming: the configs whose tokens are kept.
        size, multiple: see `choose_tokens`.
        progress: called with the number of documents read.
    """
    parts, rows = TokenizerParts.of(tokenizer), config.get_text_config().vocab_size
    named = set[int]().union(*map(named_tokens, naming))
    documents = itertools.chain.from_iterable(map(stream_documents, sources))
    counts, read = count_tokens(tokenizer, documents, rows, progress)
    kept = choose_tokens(parts, counts, {token for token in named if token < rows}, size, multiple)
    occurring = int(counts.count_nonzero())
    if len(kept) == rows:
        raise AdaPrunerError(
            f"no token can be removed: {occurring:,} of the {rows:,} tokens occur in the text; choose a smaller"
            " `vocabulary_size`, or a text in fewer languages"
        )
    known = [token for token in parts.texts if token < rows]
    scripts = dict(zip(known, scripts_of(tokenizer, known), strict=True))
    before, after = Counter(scripts.values()), Counter(scripts[token] for token in kept if token in scripts)
    vocabulary = Vocabulary(kept=kept, beyond=tuple(sorted(token for token in parts.texts if token >= rows)))
    with torch.device("meta"):
        parameters = [count_parameters(new_model(of)) for of in (config, cut_config(config, vocabulary))]
    summary = VocabularySummary(
        before=rows,
        after=len(kept),
        occurring=occurring,
        counted_bytes=read,
        scripts={script: (count, after[script]) for script, count in before.most_common()},
        parameters_before=parameters[0],
        parameters_after=parameters[1],
    )
    return vocabulary, summary


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


def choose_tokens(
    parts: TokenizerParts, counts: Tensor, named: Iterable[int], size: int | None = None, multiple: int = 64
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
