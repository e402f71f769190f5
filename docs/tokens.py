"""Draws what fewer tokens cost: `python docs/tokens.py` makes images/tokens.svg of research/results/tokens.json."""

from __future__ import annotations

import json
import math
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

PICTURE = Path(__file__).parent / "images" / "tokens.svg"
RESULTS = Path(__file__).parents[1] / "research" / "results" / "tokens.json"
_LEFT, _PANEL, _GAP, _TOP, _PLOT = 44, 190, 30, 64, 200
_FEWEST, _MOST, _HIGHEST = 20_000, 80_000, 0.4
_TEXTS = {"prose": ("wikitext2", "ptb", "boolq"), "code": ("humaneval", "packages")}
_STYLE = (
    "text{font:12px sans-serif;fill:#1c2833}.middle{text-anchor:middle}.end{text-anchor:end}.grid{stroke:#d5dbe1}"
    ".paper{fill:#fff}.prose{fill:#2a6fb0;stroke:#2a6fb0}.code{fill:#c4542d;stroke:#c4542d}"
    "polyline{fill:none!important;stroke-width:2}.removed{fill:#5d6d7e;font-size:11px}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.paper{fill:#0d1117}.grid{stroke:#30363d}"
    ".removed{fill:#9da7b1}.prose{fill:#58a6ff;stroke:#58a6ff}.code{fill:#e58a66;stroke:#e58a66}}"
)

Row = dict[str, Any]


def rise(row: Row, kind: str) -> float:
    """The relative rise of bits per byte, mean of the texts of a kind."""
    return sum(row[text] for text in _TEXTS[kind]) / len(_TEXTS[kind]) - 1


def draw(rows: list[Row]) -> str:
    """The picture as SVG: a panel for each model, a line for each kind of text, a mark for each number of tokens."""
    panels = {model: [*own] for model, own in groupby(rows, key=lambda row: str(row["model"]))}
    width, height = _LEFT + len(panels) * (_PANEL + _GAP), _TOP + _PLOT + 62
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>Rise of bits per byte against the number of tokens: {escape(', '.join(panels))}</title>",
        f'<style>{_STYLE}</style><rect class="paper" width="{width}" height="{height}"/>',
    ]
    for number, kind in enumerate(_TEXTS):
        x = _LEFT + 90 * number
        lines.append(f'<circle class="{kind}" cx="{x}" cy="16" r="5"/><text x="{x + 10}" y="20">{kind}</text>')
    lines.append(f'<text class="end" x="{width - 12}" y="20">rise of bits per byte; below: of all parameters</text>')
    for number, (model, own) in enumerate(panels.items()):
        lines += _panel(_LEFT + number * (_PANEL + _GAP), model, own)
    return "\n".join([*lines, "</svg>", ""])


def _panel(left: int, model: str, own: list[Row]) -> list[str]:
    bottom = _TOP + _PLOT
    lines = [f'<text x="{left}" y="{_TOP - 14}" font-weight="bold">{escape(model)}</text>']
    for part in range(5):
        y = bottom - part * _PLOT / 4
        lines.append(f'<line class="grid" x1="{left}" x2="{left + _PANEL}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="end" x="{left - 5}" y="{y + 4:.1f}">{part * _HIGHEST / 4:.0%}</text>')
    places = [left + _PANEL * math.log(row["tokens"] / _FEWEST) / math.log(_MOST / _FEWEST) for row in own]
    for row, x in zip(own, places, strict=True):
        lines.append(f'<text class="middle" x="{x:.1f}" y="{bottom + 18}">{row["tokens"] / 1024:.0f}k</text>')
        lines.append(f'<text class="middle removed" x="{x:.1f}" y="{bottom + 34}">−{escape(row["removed"])}</text>')
    lines.append(f'<text class="middle" x="{left + _PANEL // 2}" y="{bottom + 54}">tokens kept</text>')
    for kind in _TEXTS:
        points = [(x, bottom - rise(row, kind) / _HIGHEST * _PLOT) for row, x in zip(own, places, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(f'<polyline class="{kind}" points="{path}"/>')
        lines += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
    return lines


if __name__ == "__main__":
    PICTURE.write_text(
        draw(json.loads(RESULTS.read_text(encoding="utf-8"))["tables"]["models"]["rows"]), encoding="utf-8"
    )
