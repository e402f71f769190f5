"""Windows of several kinds of text, which keep the names of their kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapruner.calibration._blend import BlendPart


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


def counts_of(blend: Sequence[BlendPart], count: int) -> dict[str, int]:
    """The number of windows of each part of a blend, which add up to `count` (largest remainders)."""
    exact = [part.share * count for part in blend]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(blend)), key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: count - sum(counts)]:
        counts[part] += 1
    return {part.name: number for part, number in zip(blend, counts, strict=True)}


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
