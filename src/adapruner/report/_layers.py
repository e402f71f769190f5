"""What was removed from every layer, of every kind of structure, to be seen at one glance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapruner.planning import BlockPlan, PruningPlan
from adapruner.structure import show_layers
from adapruner.tokens import VocabularySummary

_NAMES = {"heads": "attention", "experts": "experts", "channels": "feed-forward"}


@dataclass(frozen=True)
class LayerBar:
    """One block of one layer.

    Attributes:
        layer: its number, from 0.
        kept: the fraction of its groups that is kept; 0 where the block was removed whole.
    """

    layer: int
    kept: float
    label: str


@dataclass(frozen=True)
class LayerRow:
    """The blocks of one kind, layer by layer; or the vocabulary as a single bar.

    Attributes:
        summary: what was removed of the kind, in words.
    """

    name: str
    summary: str
    bars: tuple[LayerBar, ...]


def layer_rows(plan: PruningPlan, vocabulary: VocabularySummary | None) -> list[LayerRow]:
    """A row for each kind of structure that the model has, and one for its vocabulary where that was pruned."""
    rows = [] if vocabulary is None else [_of_vocabulary(vocabulary)]
    for kind in plan.kinds:
        blocks = [block for block in plan.blocks if block.kind == kind]
        name = plan.name_of(kind)
        bars = tuple(
            LayerBar(block.layer, len(block.kept) / block.groups, f"layer {block.layer}: {block.kept_of_all} {name}")
            for block in blocks
        )
        rows.append(LayerRow(_NAMES[kind], "; ".join(_summary(blocks, name)), bars))
    return rows


def whole_layers(plan: PruningPlan) -> str:
    """The layers of which every block was removed."""
    return show_layers(layer for layer, own in plan.by_layer.items() if not any(block.kept for block in own.values()))


def _summary(blocks: list[BlockPlan], name: str) -> Iterator[str]:
    removed = sum(block.groups - len(block.kept) for block in blocks)
    of_all = sum(block.groups for block in blocks)
    yield (
        f"{removed:,} of {of_all:,} {name} removed ({removed / of_all:.1%})"
        if removed
        else f"all {of_all:,} {name} kept"
    )
    if whole := [block.layer for block in blocks if not block.kept]:
        yield f"none left in layer{'s'[: len(whole) > 1]} {show_layers(whole)}"


def _of_vocabulary(summary: VocabularySummary) -> LayerRow:
    removed = 1 - summary.after / summary.before
    text = f"{summary.before - summary.after:,} of {summary.before:,} tokens removed ({removed:.1%})"
    return LayerRow("vocabulary", text, (LayerBar(0, 1 - removed, f"{summary.after:,} of {summary.before:,} tokens"),))
