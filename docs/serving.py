"""Draws quality against bytes and speed in vLLM: `python docs/serving.py` makes images/serving.svg of
research/results/serving.json."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

PICTURE = Path(__file__).parent / "images" / "serving.svg"
RESULTS = Path(__file__).parents[1] / "research" / "results" / "serving.json"
_LEFT, _PANEL, _GAP, _TOP, _PLOT = 44, 236, 46, 64, 200
_WEIGHTS = {"bfloat16": "full", "W4A16": "four"}
_STYLE = (
    "text{font:12px sans-serif;fill:#1c2833}.middle{text-anchor:middle}.end{text-anchor:end}.grid{stroke:#d5dbe1}"
    ".paper{fill:#fff}.full{fill:#2a6fb0}.four{fill:#c4542d}.label{paint-order:stroke;stroke:#fff;stroke-width:3}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.paper{fill:#0d1117}.grid{stroke:#30363d}"
    ".label{stroke:#0d1117}.full{fill:#58a6ff}.four{fill:#e58a66}}"
)

Row = dict[str, Any]


class Axis(NamedTuple):
    """A quantity of the table, its title, and its ticks, which are equally far apart and span the panel."""

    key: str
    title: str
    ticks: tuple[float, ...]

    def share(self, row: Row) -> float:
        """The place of a row between the first and the last tick."""
        return float((row[self.key] - self.ticks[0]) / (self.ticks[-1] - self.ticks[0]))


_BITS = Axis("bits", "bits per byte (lower is better)", (1.1, 1.2, 1.3, 1.4))
_PANELS = (
    Axis("mb", "MB (smaller is better)", (600, 800, 1000, 1200, 1400)),
    Axis("prompt 1", "prompt tokens/s (larger is better)", (1200, 1500, 1800, 2100, 2400)),
    Axis("new 1", "new tokens/s (larger is better)", (12, 15, 18, 21, 24, 27)),
)


def draw(rows: list[Row]) -> str:
    """The picture as SVG: a panel for size and for each speed, a mark for each row whose bits per byte are known.

    A row without a label is drawn unlabelled: its mark lies beside one that has the label of both.
    """
    width, height = _LEFT + len(_PANELS) * (_PANEL + _GAP), _TOP + _PLOT + 48
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>Bits per byte against megabytes, prompt tokens and new tokens per second in vLLM</title>",
        f'<style>{_STYLE}</style><rect class="paper" width="{width}" height="{height}"/>',
    ]
    for number, (weights, colour) in enumerate(_WEIGHTS.items()):
        x = _LEFT + 90 * number
        lines.append(f'<circle class="{colour}" cx="{x + 5}" cy="16" r="5"/><text x="{x + 15}" y="20">{weights}</text>')
    lines.append(f'<text class="end" x="{width - _GAP}" y="20">speeds with one prompt; %: parameters removed</text>')
    lines.append(f'<text x="{_LEFT}" y="{_TOP - 14}">{_BITS.title}</text>')
    for number, axis in enumerate(_PANELS):
        lines += _panel(_LEFT + number * (_PANEL + _GAP), axis, [row for row in rows if _BITS.key in row])
    return "\n".join([*lines, "</svg>", ""])


def _panel(left: int, axis: Axis, rows: list[Row]) -> list[str]:
    bottom = _TOP + _PLOT
    lines = [f'<text class="middle" x="{left + _PANEL // 2}" y="{bottom + 40}">{axis.title}</text>']
    for number, tick in enumerate(_BITS.ticks):
        y = bottom - number * _PLOT / (len(_BITS.ticks) - 1)
        lines.append(f'<line class="grid" x1="{left}" x2="{left + _PANEL}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if axis is _PANELS[0]:
            lines.append(f'<text class="end" x="{left - 5}" y="{y + 4:.1f}">{tick:.1f}</text>')
    for number, tick in enumerate(axis.ticks):
        x = left + number * _PANEL / (len(axis.ticks) - 1)
        lines.append(f'<text class="middle" x="{x:.1f}" y="{bottom + 18}">{tick:,}</text>')
    labels = list[str]()
    for row in rows:
        x, y = left + axis.share(row) * _PANEL, bottom - _BITS.share(row) * _PLOT
        lines.append(f'<circle class="{_WEIGHTS[row["weights"]]}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        if "label" in row:
            labels.append(f'<text class="label middle" x="{x:.1f}" y="{y - 8:.1f}">{escape(row["label"])}</text>')
    return [*lines, *labels]


if __name__ == "__main__":
    PICTURE.write_text(
        draw(json.loads(RESULTS.read_text(encoding="utf-8"))["tables"]["blocks"]["rows"]), encoding="utf-8"
    )
