"""Draws time against quality: `python research/picture.py` makes frontier.svg of results/effort.json.

A mark is a row: the minutes until its model is saved, and the geometric mean of its perplexities, relative to the dense
model's. The line connects the rows that no other row beats in both.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEXTS = ("boolq", "wikitext2", "ptb")
LEFT, TOP, WIDTH, HEIGHT = 60, 34, 560, 300
MINUTES, TIMES = (8, 160), (1.1, 1.6)
TICKS = ((10.0, 20.0, 40.0, 80.0), (1.1, 1.2, 1.3, 1.4, 1.5, 1.6))
STYLE = (
    "text{font:12px sans-serif;fill:#1c2833}.middle{text-anchor:middle}.end{text-anchor:end}.paper{fill:#fff}"
    ".grid{stroke:#d5dbe1}.frontier{fill:none;stroke:#2a6fb0;stroke-width:2}.trained{fill:#3a8f4f}.pruned{fill:#2a6fb0}"
)


def draw(rows: list[dict[str, Any]]) -> str:
    """The picture as SVG.

    Args:
        rows: with the text of the "mark", "minutes" if known, whether the model "is_trained", and its perplexity on
            each text.
    """
    rows = [row for row in rows if row["minutes"] is not None]
    places = [(across(row["minutes"]), up(math.prod(row[text] for text in TEXTS) ** (1 / len(TEXTS)))) for row in rows]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {TOP + HEIGHT + 50}" role="img">',
        "<title>Perplexity relative to the original model, against minutes until the pruned model is saved</title>",
        f'<style>{STYLE}</style><rect class="paper" width="100%" height="100%"/>',
        f'<text x="10" y="18">perplexity, times dense, mean of {len(TEXTS)} texts; green: fine-tuned</text>',
        f'<text class="end" x="{LEFT + WIDTH}" y="{TOP + HEIGHT + 42}">minutes on one core</text>',
    ]
    for tick in TICKS[0]:
        x = across(tick)
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + HEIGHT}"/>')
        lines.append(f'<text class="middle" x="{x:.1f}" y="{TOP + HEIGHT + 20}">{tick:g}</text>')
    for tick in TICKS[1]:
        y = up(tick)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="end" x="{LEFT - 8}" y="{y + 4:.1f}">{tick:g}</text>')
    # Lower on the page is better.
    best = [(x, y) for x, y in sorted(places) if all(y > other for before, other in places if before < x)]
    lines.append(f'<polyline class="frontier" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in best)}"/>')
    for row, (x, y) in zip(rows, places, strict=True):
        kind = "trained" if row["is_trained"] else "pruned"
        lines.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        # Away from the line, which falls to the right.
        side = (
            f'class="end" x="{x - 9:.1f}" y="{y + 16:.1f}"' if row["is_trained"] else f'x="{x + 9:.1f}" y="{y - 9:.1f}"'
        )
        lines.append(f"<text {side}>{escape(row['mark'])}</text>")
    return "\n".join([*lines, "</svg>", ""])


def across(minutes: float) -> float:
    """Time has a logarithmic scale."""
    return LEFT + WIDTH * math.log(minutes / MINUTES[0]) / math.log(MINUTES[1] / MINUTES[0])


def up(times: float) -> float:
    return TOP + HEIGHT * (TIMES[1] - times) / (TIMES[1] - TIMES[0])


if __name__ == "__main__":
    content = json.loads((HERE / "results" / "effort.json").read_text(encoding="utf-8"))
    (HERE / "frontier.svg").write_text(draw(content["tables"]["efforts"]["rows"]), encoding="utf-8")
