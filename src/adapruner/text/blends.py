"""Blends: datasets with their shares, in one text such as `mix,notes.txt:0.5` or `mix:0.6,answers:alpaca:0.4`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import given_path
from adapruner.text.sources import ANSWERS, MIX, Source, absolute_source, parse_source, source_names
from adapruner.text.written import kinds

_SHARE = re.compile(r"-?(\d+\.?\d*|\.\d+)")


@dataclass(frozen=True)
class BlendPart:
    """A dataset of a blend.

    Attributes:
        name: as the user wrote it, without the share; of `mix`, one of its kinds of text.
        share: the fraction of all text; the shares of a blend add up to 1.
        source: the dataset; of `answers:DATASET`, that of the prompts; None for a kind of `mix`.
    """

    name: str
    share: float
    source: Source | None

    @property
    def is_written(self) -> bool:
        """True for text that a model writes: a kind of `mix`, or answers to the prompts of the source."""
        return self.source is None or self.name.startswith(ANSWERS)

    @property
    def description(self) -> str:
        """The dataset in messages, with its part."""
        return str(self.source) if self.source and not self.is_written else self.name


def parse_blend(text: str, missing_ok: bool = False) -> tuple[BlendPart, ...]:
    """Reads `DATASET`, or several with their shares, `DATASET:SHARE,DATASET:SHARE`. Those without a share have equal
    parts of what is left.

    A dataset is as for `parse_source`, or `answers:DATASET`, or `mix`: all of its kinds, equally. Its share is the
    number after its last colon.

    Args:
        missing_ok: accept a local file that is missing.

    Raises:
        AdaPrunerError: a dataset is unknown or named twice, or the shares are not clear.
    """
    named = _split(text)
    names, numbers = [name for name, _ in named], [number for _, number in named if number]
    if not named or not all(names):
        raise AdaPrunerError(f"{text!r} names no dataset: expected DATASET, or DATASET:SHARE,DATASET:SHARE")
    if len(named) == 1 and numbers and float(numbers[0]) != 1:
        raise AdaPrunerError(
            f"{text!r} is one dataset, which needs no share: remove :{numbers[0]}; if that is part of the name, write"
            f" {text}:1"
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise AdaPrunerError(f"{twice!r} is named twice: write it once, with the sum of its shares")
    shares = [float(number) for number in numbers]
    without = len(named) - len(numbers)
    if min(shares, default=1.0) < 0 or (without and sum(shares) >= 1) or (not without and not sum(shares)):
        raise AdaPrunerError(
            f"the shares in {text!r} are {', '.join(numbers)}: none may be negative, one must be more than 0, and they"
            " must leave something to datasets without a share"
        )
    rest = (1 - sum(shares)) / without if without else 0.0
    total = sum(shares) + rest * without
    parts = list[BlendPart]()
    for name, number in named:
        share = (float(number) if number else rest) / total
        if share and name == MIX:
            parts += [BlendPart(kind, share / len(kinds()), None) for kind in kinds()]
        elif share:
            parts.append(BlendPart(name, share, _source(name, missing_ok)))
    return tuple(parts)


def sources_of(blend: Sequence[BlendPart]) -> list[tuple[str, Source]]:
    """The datasets that a blend reads, each with the name of its part."""
    return [(part.name, part.source) for part in blend if part.source]


def absolute_blend(text: str) -> str:
    """The same blend with absolute paths, which is valid in any working directory."""
    parts = []
    for name, number in _split(text):
        prefix = ANSWERS if name.startswith(ANSWERS) else ""
        dataset = name.removeprefix(ANSWERS)
        parts.append(f"{prefix}{dataset if name == MIX else absolute_source(dataset)}{number and f':{number}'}")
    return ",".join(parts)


def _source(name: str, missing_ok: bool) -> Source:
    if name == ANSWERS + MIX:
        raise AdaPrunerError(f"{name!r}: {MIX} has answers already; name a dataset of instructions")
    return parse_source(name.removeprefix(ANSWERS), missing_ok=missing_ok)


def _split(text: str) -> list[tuple[str, str]]:
    """The names and their shares, as they are written; the share is empty where there is none."""
    return [_with_share(text)] if _is_file(_with_share(text)[0]) else [*map(_with_share, source_names([text]))]


def _with_share(text: str) -> tuple[str, str]:
    name, colon, number = text.rpartition(":")
    if not colon or not _SHARE.fullmatch(number):
        return text, ""
    if not name or not _is_file(text):
        return name, number
    if _is_file(name):
        raise AdaPrunerError(f"{text!r} is a file, and {name!r} too: rename one of them")
    return text, ""


def _is_file(name: str) -> bool:
    return given_path(name.removeprefix(ANSWERS)).is_file()


def counts_of(blend: Sequence[BlendPart], count: int) -> dict[str, int]:
    """The number of windows of each part of a blend, which add up to `count` (largest remainders)."""
    exact = [part.share * count for part in blend]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(blend)), key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: count - sum(counts)]:
        counts[part] += 1
    return {part.name: number for part, number in zip(blend, counts, strict=True)}
