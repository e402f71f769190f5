"""Blends: datasets with their shares, in one text such as `self:0.3,boolq-passages:0.3,answers:alpaca:0.4`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from adapruner.calibration._sources import ANSWERS, SELF_GENERATED, Source, absolute_source, parse_source, source_names
from adapruner.errors import AdaPrunerError
from adapruner.paths import given_path

_SHARE = re.compile(r"-?(\d+\.?\d*|\.\d+)")


@dataclass(frozen=True)
class BlendPart:
    """A dataset of a blend.

    Attributes:
        name: as the user wrote it, without the share.
        share: the fraction of all examples; the shares of a blend add up to 1.
        source: the dataset; of `answers:DATASET`, that of the prompts; None for `self`.
    """

    name: str
    share: float
    source: Source | None

    @property
    def is_written(self) -> bool:
        """True for text that a model writes for the training: `self`, or answers to the prompts of the source."""
        return _is_written(self.name)

    @property
    def description(self) -> str:
        """The dataset in messages, with its part."""
        return str(self.source) if self.source and not self.is_written else self.name


def parse_blend(text: str, missing_ok: bool = False) -> tuple[BlendPart, ...]:
    """Reads `DATASET`, or several with their shares, `DATASET:SHARE,DATASET:SHARE`. Without shares, all are equal.

    A dataset is as for `parse_source`, or `self`, or `answers:DATASET`. Its share is the number after its last colon.

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
    if len(numbers) not in (0, len(named)):
        without = next(name for name, number in named if not number)
        raise AdaPrunerError(f"{without!r} has no share and others have one: write a share for each, {without}:SHARE")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise AdaPrunerError(f"{twice!r} is named twice: write it once, with the sum of its shares")
    shares = [float(number or 1) for _, number in named]
    if min(shares) < 0 or not sum(shares):
        raise AdaPrunerError(
            f"the shares in {text!r} are {', '.join(numbers)}: none may be negative, and one must be more than 0"
        )
    return tuple(
        BlendPart(name, share / sum(shares), _source(name, missing_ok))
        for name, share in zip(names, shares, strict=True)
        if share
    )


def has_written_part(text: str) -> bool:
    """True if a model writes some of the text of a blend; see `BlendPart.is_written`."""
    return any(_is_written(name) for name, _ in _split(text))


def blend_sources(blend: Sequence[BlendPart]) -> list[Source]:
    """The datasets that a blend reads."""
    return [part.source for part in blend if part.source]


def absolute_blend(text: str) -> str:
    """The same blend with absolute paths, which is valid in any working directory."""
    parts = []
    for name, number in _split(text):
        prefix = ANSWERS if name.startswith(ANSWERS) else ""
        parts.append(f"{prefix}{absolute_source(name.removeprefix(ANSWERS))}{number and f':{number}'}")
    return ",".join(parts)


def _is_written(name: str) -> bool:
    return name == SELF_GENERATED or name.startswith(ANSWERS)


def _source(name: str, missing_ok: bool) -> Source | None:
    prompts = name.removeprefix(ANSWERS)
    if prompts == SELF_GENERATED:
        if name != prompts:
            raise AdaPrunerError(
                f"{name!r}: {SELF_GENERATED} holds no prompts to answer; name a dataset of instructions"
            )
        return None
    return parse_source(prompts, missing_ok=missing_ok)


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
