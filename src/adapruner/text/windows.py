"""Tokens of text, and windows of them: to calibrate on, by kind, or to evaluate on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.model.places import reported
from adapruner.text.reading import provenance, read_documents, read_windows
from adapruner.text.sources import Source

# A longer text is tokenized in pieces: an encoding needs up to 300 bytes for each character.
_MOST_CHARACTERS, _OF_A_PIECE = 1 << 22, 1 << 18


def tokenize(tokenizer: Tokenizer, text: str | list[str], **options: object) -> BatchEncoding:
    """The encoding of a text, or of several."""
    with reported(f"the tokenizer {tokenizer.name_or_path} fails on a text"):
        # A text may be longer than those of the model.
        encoding: BatchEncoding = tokenizer(
            text, verbose=False, return_attention_mask=False, return_token_type_ids=False, **options
        )
    return encoding


def tokens_of(tokenizer: Tokenizer, text: str, special: bool = False) -> Tensor:
    """[tokens], int64: the tokens of a text, with the special ones that the tokenizer adds if `special`."""
    return torch.cat([tokens for tokens, _ in _encodings(tokenizer, text, special, with_ends=False)])


def tokens_to_continue(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text that a model is to continue: with the special tokens that begin a text, and without those
    that end it."""
    return [*start_tokens(tokenizer), *tokens_of(tokenizer, text).tolist()]


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts in front of a text."""
    tokens, bare = (tokenize(tokenizer, "a", add_special_tokens=special).input_ids for special in (True, False))
    length = next((first for first in range(len(tokens)) if tokens[first : first + len(bare)] == bare), 0)
    return list(tokens[:length])


def _encodings(tokenizer: Tokenizer, text: str, special: bool, with_ends: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens and ends of each piece of a text; no ends where they are not wanted."""
    read, is_whole = 0, len(text) <= _MOST_CHARACTERS
    if special and not is_whole:
        start = torch.tensor(start_tokens(tokenizer), dtype=torch.int64)
        yield start, torch.zeros_like(start)
    for piece in _text_pieces(text):
        encoding = tokenize(tokenizer, piece, add_special_tokens=special and is_whole, return_offsets_mapping=with_ends)
        offsets = torch.tensor(encoding.offset_mapping if with_ends else [], dtype=torch.int64).view(-1, 2)
        yield torch.tensor(encoding.input_ids, dtype=torch.int64), offsets[:, 1] + read
        read += len(piece)


def _text_pieces(text: str) -> Iterator[str]:
    """Consecutive parts of a text, which end before a space or a line end if there is one."""
    start, characters = 0, len(text) if len(text) <= _MOST_CHARACTERS else _OF_A_PIECE
    while len(text) - start > characters:
        most = start + characters
        end = max(text.rfind(sign, start + 1, most) for sign in " \n")
        end = most if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


# Tokens have fewer characters on average; the number of places that pieces of a long text are from; and the characters
# that are read of one out of which windows are chosen, which takes half a minute: more than texts of papers have.
_CHARACTERS, _PIECES, _MOST_READ = 8, 32, 20_000_000


def draw_windows(
    text: Source | Iterable[str], tokenizer: Tokenizer, count: int, seq_len: int, seed: int, at_least: int | None = None
) -> Tensor:
    """Draws windows from the beginnings of documents in random order; documents shorter than a window are dropped.

    If there are too few documents, longer ones give a second window, a third, and so on. Every window begins with the
    special tokens that the tokenizer puts in front of a text, if there are any.

    Args:
        text: a dataset, or documents.
        at_least: the least number of windows; by default `count`.

    Returns:
        [count, seq_len], int64; the same for the same seed.
    """
    needed = count if at_least is None else at_least
    if isinstance(text, Source) and text.holds_windows:
        pool = _given_windows(text, seq_len, needed)
        return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]]
    documents = list(dict.fromkeys(read_documents(text) if isinstance(text, Source) else text))
    random.Random(seed).shuffle(documents)
    start = start_of_windows(tokenizer, seq_len)
    by_document = list[Tensor]()
    for document in documents:
        if len(by_document) == count:
            break
        tokens = tokens_of(tokenizer, document)
        if len(tokens) >= seq_len - len(start):
            by_document.append(cut_into_windows(tokens, start, seq_len))
    # The first window of every document, then the second of those that have one.
    in_turn = (window for nth in zip_longest(*by_document) for window in nth if window is not None)
    windows = [*islice(in_turn, count)]
    if len(windows) < needed:
        name = text if isinstance(text, Source) else "`documents`"
        raise AdaPrunerError(
            f"the text is too short: {len(by_document)} of {len(documents)} documents in {name} have at least {seq_len}"
            f" tokens and give {len(windows)} windows, {needed} are needed; give more text, or lower `seq_len` or the"
            " number of windows (`pool`, `objective_windows`)"
        )
    return torch.stack(windows)


def text_windows(source: Source, tokenizer: Tokenizer, seq_len: int, limit: int | None = None) -> Tensor:
    """Cuts the running text of a source into windows that do not overlap; the tail is dropped.

    Documents are joined by an empty line and tokenized at once, as LLM-Pruner does (arXiv 2305.11627). But every window
    begins with the special tokens that the tokenizer puts in front of a text, if there are any: models that were
    trained with them predict badly without.

    Returns:
        [windows, seq_len], int64.
    """
    if source.holds_windows:
        return _given_windows(source, seq_len, 1)
    start, documents = start_of_windows(tokenizer, seq_len), read_documents(source)
    size = seq_len - len(start)
    chosen = _pieces(documents, _MOST_READ if limit is None else limit * size * _CHARACTERS)
    tokens = tokens_of(tokenizer, "\n\n".join(chosen))
    if limit is not None and len(tokens) < limit * size and len(chosen) < len(documents):
        tokens = tokens_of(tokenizer, "\n\n".join(documents))
    _check_length(tokens, size, str(source))
    return cut_into_windows(tokens, start, seq_len)


def _pieces(documents: list[str], characters: int) -> list[str]:
    """Evenly spaced runs of documents, about so many characters in all; all documents if they have no more."""
    if sum(map(len, documents)) <= characters:
        return documents
    chosen = []
    for number in range(_PIECES):
        left = characters // _PIECES
        for document in documents[len(documents) * number // _PIECES : len(documents) * (number + 1) // _PIECES]:
            if left <= 0:
                break
            chosen.append(document)
            left -= len(document)
    return chosen


def _given_windows(source: Source, seq_len: int, at_least: int) -> Tensor:
    """The windows of a source that holds windows, as they are; refuses too few, or windows of another length."""
    windows = read_windows(source)
    if len(windows) < at_least:
        raise AdaPrunerError(
            f"{source} has {len(windows)} windows, {at_least} are needed: give more, or lower `pool` or"
            " `objective_windows`. Windows are put into three parts by their hash"
        )
    if windows.shape[1] != seq_len:
        raise AdaPrunerError(f"the windows in {source} have {windows.shape[1]} tokens: set `seq_len` to that")
    return windows


def cut_into_windows(tokens: Tensor, start: Tensor, seq_len: int, stride: int | None = None) -> Tensor:
    """Windows of running tokens, each of which begins as the tokenizer begins a text; the tail is dropped. All windows
    of this package are cut here, but for those that a user gives.

    Args:
        tokens: [tokens], int64, at least as many as a window holds.
        start: [special tokens], int64, see `start_of_windows`.
        stride: running tokens from the beginning of a window to that of the next; by default they do not overlap.

    Returns:
        [windows, seq_len], int64.
    """
    size = seq_len - len(start)
    windows = tokens.unfold(0, size, stride or size)
    return torch.cat([start.expand(len(windows), -1), windows], 1)


def joined(windows: Tensor, start: Tensor, length: int) -> list[Tensor]:
    """The text of windows, one after the other, in longer windows. What a model wrote is running text again; windows
    from different places of a dataset are packed into one.

    Args:
        windows: [windows, tokens], int64. Those of a user may begin with other tokens than `start`.
        start: [special tokens], int64, see `start_of_windows`.
        length: tokens of a window.

    Returns:
        [length] each, int64, and a last one that may be shorter. They begin with `start` if the given ones do.
    """
    if not (windows[:, : len(start)] == start).all():
        start = start[:0]
    running = windows[:, len(start) :].flatten()
    return [torch.cat([start, part]) for part in running.split(length - len(start))]


def start_of_windows(tokenizer: Tokenizer, seq_len: int) -> Tensor:
    """[tokens], int64: the special tokens in front of a text; refuses windows that have no room for others."""
    start = start_tokens(tokenizer)
    if seq_len <= len(start):
        raise AdaPrunerError(
            f"`seq_len` {seq_len} leaves no room for text: every window begins with {len(start)} special tokens"
        )
    return torch.tensor(start, dtype=torch.int64)


def _check_length(tokens: Tensor, size: int, name: str) -> None:
    """Refuses a text with fewer tokens than a window holds."""
    if len(tokens) < size:
        raise AdaPrunerError(f"{name} has {len(tokens)} tokens, less than one window of {size}")


def evenly_spaced(windows: Tensor, limit: int | None) -> Tensor:
    """At most `limit` of the windows, from beginning to end."""
    if limit is None or limit >= len(windows):
        return windows
    return windows[torch.arange(limit) * len(windows) // limit]


@dataclass(frozen=True)
class EvaluationText:
    """A dataset to measure perplexity on.

    Attributes:
        windows: [windows, seq_len], int64.
        stride: tokens between the beginnings of windows.
        provenance: dataset, split, revision and tokenizer.
        predicted_bytes: UTF-8 bytes of the predicted text; None if the tokenizer does not know the text of a token.
        special_tokens: the number of special tokens at the beginning of every window.
    """

    windows: Tensor
    stride: int
    provenance: dict[str, str]
    predicted_bytes: int | None = None
    special_tokens: int = 0

    @property
    def about(self) -> dict[str, Any]:
        """Everything but the windows, by name."""
        return {name: value for name, value in vars(self).items() if name != "windows"}


# Tokens of the long windows that are reported on, and how many of these are read at most.
_LONG, _MOST_LONG_WINDOWS = 2048, 48


def texts_to_report(
    text: Source | str,
    tokenizer: Tokenizer,
    seq_len: int,
    limit: int | None,
    positions: int | None,
    bos: bool = True,
    name: str | None = None,
) -> dict[str, EvaluationText]:
    """A dataset in windows of `seq_len` tokens, and in windows of 2048 or as many as the model and the text have, with
    the number of tokens in the name: models lose more in long text than at its beginning.

    Args:
        limit: the largest number of windows of `seq_len` tokens; the long ones have no more tokens, and are at most 48.
        positions: of the model, if they have an end.
    """
    name = name or str(text)
    short = evaluation_text(text, tokenizer, seq_len, limit, bos=bos, name=name)
    texts = {name: short}
    length = min(_LONG, positions or _LONG, len(short.windows) * (seq_len - short.special_tokens))
    if length > seq_len and not (isinstance(text, Source) and text.holds_windows):
        most = min(_MOST_LONG_WINDOWS, max(1, len(short.windows) * seq_len // length))
        texts[f"{name}, {length:,} tokens"] = evaluation_text(text, tokenizer, length, most, bos=bos, name=name)
    return texts


def evaluation_text(
    text: Source | str,
    tokenizer: Tokenizer,
    seq_len: int,
    limit: int | None,
    stride: int | None = None,
    bos: bool = True,
    name: str | None = None,
) -> EvaluationText:
    """Cuts running text into windows to measure perplexity on.

    Args:
        text: a dataset, whose documents are joined by empty lines, or the text itself.
        limit: the largest number of windows, evenly spaced; of more than 20 million characters, out of pieces.
        stride: tokens of the text between the beginnings of windows; by default they do not overlap.
        bos: True to begin every window with the special tokens that the tokenizer puts in front of a text.
            LLM-Pruner (arXiv 2305.11627), SparseGPT and others have them only at the beginning of the whole text.
        name: of a text that is not a dataset, for messages.
    """
    about = {}
    if isinstance(text, Source):
        about, name = provenance(text), str(text)
        if text.holds_windows:
            if stride is not None:
                raise AdaPrunerError(f"{text} holds windows as they are: leave `stride` out")
            return EvaluationText(evenly_spaced(_given_windows(text, seq_len, 1), limit), seq_len, about)
        text = "\n\n".join(read_documents(text) if limit is None else _pieces(read_documents(text), _MOST_READ))
    start = start_of_windows(tokenizer, seq_len) if bos else torch.tensor([], dtype=torch.int64)
    size = seq_len - len(start)
    stride = min(stride or size, size)
    if tokenizer.is_fast:
        # Of special tokens, the characters up to their end are none.
        tokens, ends = map(torch.cat, zip(*_encodings(tokenizer, text, not bos, with_ends=True), strict=True))
    else:
        tokens, ends = tokens_of(tokenizer, text, special=not bos), None
    _check_length(tokens, size, name or "the text")
    windows = evenly_spaced(cut_into_windows(tokens, start, seq_len, stride), limit)
    predicted_bytes = None
    if ends is not None:
        counted = _bytes_of_tokens(text, ends).unfold(0, size, stride)
        counted, context = evenly_spaced(counted, limit), 0 if len(start) else 1
        predicted_bytes = int(counted[0, context:].sum() + counted[1:, max(size - stride, context) :].sum())
    tokenizer_name = Path(tokenizer.name_or_path).name or type(tokenizer).__name__
    about["tokenizer"] = f"{tokenizer_name}, {len(tokenizer):,} tokens"
    if len(start):
        about["every_window_after"] = "".join(tokenizer.convert_ids_to_tokens(start.tolist()))
    return EvaluationText(windows, stride, about, predicted_bytes, len(start))


def _bytes_of_tokens(text: str, ends: Tensor) -> Tensor:
    """[tokens], int64: UTF-8 bytes of the text of each token; special tokens have none.

    Args:
        ends: [tokens], int64: the number of characters up to the end of each token; 0 for special tokens.
    """
    points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    widths = 1 + (points >= 0x80).byte() + (points >= 0x800).byte() + (points >= 0x10000).byte()
    nothing = torch.zeros(1, dtype=torch.int64)
    bytes_until = torch.cat([nothing, widths.cumsum(0)])
    return bytes_until[ends.cummax(0).values].diff(prepend=nothing)


def save_texts(texts: dict[str, EvaluationText], path: Path) -> None:
    """Writes texts to report on, by name, to a safetensors file."""
    about = {name: text.about for name, text in texts.items()}
    save_file({name: text.windows for name, text in texts.items()}, path, {"texts": json.dumps(about)})


def load_texts(path: Path) -> dict[str, EvaluationText]:
    """Reads what `save_texts` wrote."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["texts"])
        return {name: EvaluationText(file.get_tensor(name), **described) for name, described in about.items()}


@dataclass(frozen=True)
class Text:
    """Windows of tokens of several kinds, evenly mixed: any run of them has about the shares of all.

    Attributes:
        windows: [windows, tokens], int64.
        kinds: the kind of each window: of `mix`, or the name of a dataset.
    """

    windows: Tensor
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.windows)

    @classmethod
    def joined(cls, texts: Sequence[Text]) -> Text:
        """Several texts, evenly mixed again."""
        by_kind = dict.fromkeys(kind for text in texts for kind in text.kinds)
        own = {kind: [text.by_kind[kind] for text in texts if kind in text.kinds] for kind in by_kind}
        return cls.mixed({kind: torch.cat(windows) for kind, windows in own.items()})

    @classmethod
    def mixed(cls, by_kind: Mapping[str, Tensor]) -> Text:
        """The windows of all kinds, [windows, tokens] each; those of a kind keep their order."""
        parts = sorted(by_kind.items())
        places = torch.cat([(torch.arange(len(own), dtype=torch.float64) + 0.5) / max(1, len(own)) for _, own in parts])
        order = places.argsort(stable=True)
        kinds = [kind for kind, own in parts for _ in range(len(own))]
        return cls(torch.cat([own for _, own in parts])[order], tuple(kinds[place] for place in order.tolist()))

    @property
    def by_kind(self) -> dict[str, Tensor]:
        """The windows of each kind, in their order."""
        return {kind: self.windows[places] for kind, places in places_of(self.kinds).items()}

    def held_out(self, count: int) -> tuple[Text, Text]:
        """All windows but the last of every kind, and these: about `count`, in the shares of the kinds, at most a tenth
        of a kind but one of every kind that has three."""
        last = set[int]()
        for places in places_of(self.kinds).values():
            most = min(len(places) // 10, round(count * len(places) / len(self)))
            last.update(places[len(places) - max(1, most) :] if len(places) > 2 else ())
        return self.part(sorted({*range(len(self))} - last)), self.part(sorted(last))

    def part(self, places: Iterable[int]) -> Text:
        """The windows at some places."""
        chosen = [*places]
        return Text(self.windows[chosen], tuple(self.kinds[place] for place in chosen))


def places_of(kinds: Sequence[str]) -> dict[str, list[int]]:
    """The places of each kind in a sequence of kinds; kinds in the order in which they occur."""
    places: dict[str, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    return places


def save_texts_by_use(texts: dict[str, Text], path: Path) -> None:
    """Writes the text of every use to a safetensors file."""
    save_file({f"{use}/{kind}": own for use, text in texts.items() for kind, own in text.by_kind.items()}, path)


def load_texts_by_use(path: Path) -> dict[str, Text]:
    """Reads what `save_texts_by_use` wrote."""
    by_use: dict[str, dict[str, Tensor]] = {}
    for name, own in load_file(path).items():
        use, _, kind = name.partition("/")
        by_use.setdefault(use, {})[kind] = own
    return {use: Text.mixed(by_kind) for use, by_kind in by_use.items()}
