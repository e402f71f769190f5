"""Draws what each method loses against the time that it takes: `python docs/prices.py` makes docs/images/prices.svg of
research/results/models.json."""

from __future__ import annotations

import json
import math
import re
from html import escape
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

PICTURE = Path(__file__).parent / "images" / "prices.svg"
RESULTS = Path(__file__).parents[1] / "research" / "results" / "models.json"
_LEFT, _PANEL, _GAP, _TOP, _PLOT = 40, 212, 44, 64, 220
# What is drawn, with the class of its colour.
_METHODS = {"AdaPruner": "ours", "OSSCAR": "a", "SlimGPT": "b", "MoDeGPT": "c", "LLM-Pruner": "d"}
_STYLE = (
    "text{font:12px sans-serif;fill:#1c2833}.label{font-weight:bold}.middle{text-anchor:middle}.end{text-anchor:end}"
    ".grid{stroke:#d5dbe1}.paper{fill:#fff}.ours{fill:#c4542d;stroke:#c4542d}.a{fill:#2a6fb0;stroke:#2a6fb0}"
    ".b{fill:#3a8f4f;stroke:#3a8f4f}"
    ".c{fill:#8a5bb0;stroke:#8a5bb0}.d{fill:#8a99a8;stroke:#8a99a8}polyline{fill:none!important;stroke-width:1.5}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.paper{fill:#0d1117}.grid{stroke:#30363d}"
    ".ours{fill:#e58a66;stroke:#e58a66}"
    ".a{fill:#58a6ff;stroke:#58a6ff}.b{fill:#56d364;stroke:#56d364}.c{fill:#bc8cff;stroke:#bc8cff}"
    ".d{fill:#8b949e;stroke:#8b949e}}"
)


class Point(NamedTuple):
    """A method on a model: processor seconds, the mean rise of the loss in nats, and the share of blocks removed."""

    method: str
    seconds: float
    nats: float
    blocks: str


def points(rows: list[dict[str, str | float]]) -> dict[str, list[Point]]:
    """Of every model, the methods in closed form."""
    found = dict[str, list[Point]]()
    for row in rows:
        name = re.sub(r"\W*(AdaPruner|[\w-]+).*", r"\1", str(row["method"]))
        is_apart = "uniform" in str(row["method"]) or "trained" in str(row["method"])
        if is_apart:
            continue
        nats = fmean(math.log(float(row[text])) for text in ("boolq", "wikitext2", "ptb"))
        found.setdefault(str(row["model"]), []).append(Point(name, float(row["seconds"]), nats, str(row["blocks"])))
    return found


def draw(rows: list[dict[str, str | float]]) -> str:
    """The picture as SVG: a panel for each model, a mark for each method and share."""
    panels = points(rows)
    width, height = _LEFT + len(panels) * (_PANEL + _GAP), _TOP + _PLOT + 48
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>Rise of the loss against processor seconds: {escape(', '.join(panels))}</title>",
        f'<style>{_STYLE}</style><rect class="paper" width="{width}" height="{height}"/>',
    ]
    for number, (method, colour) in enumerate(_METHODS.items()):
        x = _LEFT + 110 * number
        lines.append(f'<circle class="{colour}" cx="{x}" cy="16" r="5"/><text x="{x + 10}" y="20">{method}</text>')
    lines.append(f'<text class="end" x="{width - 12}" y="20">nats, mean of three texts</text>')
    for number, (model, own) in enumerate(panels.items()):
        lines += _panel(_LEFT + number * (_PANEL + _GAP), model, own)
    return "\n".join([*lines, "</svg>", ""])


def _panel(left: int, model: str, own: list[Point]) -> list[str]:
    bottom, slowest = _TOP + _PLOT, 1.1 * max(p.seconds for p in own)
    # What loses more than twice as much as ours is beyond the picture.
    worst = 1.1 * min(max(p.nats for p in own), 2 * max(p.nats for p in own if p.method == "AdaPruner"))
    lines = [f'<text x="{left}" y="{_TOP - 14}" font-weight="bold">{escape(model)}</text>']
    for part in range(5):
        y = bottom - part * _PLOT / 4
        lines.append(f'<line class="grid" x1="{left}" x2="{left + _PANEL}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="end" x="{left - 5}" y="{y + 4:.1f}">{part * worst / 4:.2f}</text>')
        x = left + part * _PANEL / 4
        lines.append(f'<text class="middle" x="{x:.1f}" y="{bottom + 18}">{part * slowest / 4:.0f}</text>')
    lines.append(f'<text class="middle" x="{left + _PANEL // 2}" y="{bottom + 38}">processor seconds</text>')
    for method, colour in _METHODS.items():
        drawn = [point for point in own if point.method == method and point.nats <= worst]
        places = [(left + p.seconds / slowest * _PANEL, bottom - p.nats / worst * _PLOT) for p in drawn]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(f'<polyline class="{colour}" points="{path}"/>')
        for point, (x, y) in zip(drawn, places, strict=True):
            lines.append(f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
            if method == "AdaPruner":
                lines.append(f'<text class="label end" x="{x - 8:.1f}" y="{y + 4:.1f}">{point.blocks}</text>')
    return lines


if __name__ == "__main__":
    table = json.loads(RESULTS.read_text(encoding="utf-8"))["tables"]["one-shot"]
    PICTURE.write_text(draw(table["rows"]), encoding="utf-8")
