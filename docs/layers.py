"""Draws what a run removed from every layer, and a text before and after: `python docs/layers.py runs/demo` writes
docs/images/layers.svg."""

from __future__ import annotations

import re
import textwrap
from html import escape
from pathlib import Path

from cyclopts import run as run_script

from adapruner.budget.plan import PruningPlan
from adapruner.report.result import RunResult

PICTURE = Path(__file__).parent / "images" / "layers.svg"
_WIDTH, _HEIGHT, _LEFT, _TOP, _BARS, _HEADS = 800, 372, 24, 62, 110, 26
_STYLE = (
    "text{font:14px sans-serif;fill:#1c2833}.title{font-size:17px;font-weight:bold}.label{font-size:13px}"
    ".paper{fill:#fff}.gone{fill:#f3d3c7;stroke:#c4542d}.kept{fill:#2a6fb0}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.paper{fill:#0d1117}.gone{fill:#4a2a20;stroke:#e58a66}"
    ".kept{fill:#58a6ff}}"
)


def draw(result: RunResult, plan: PruningPlan, name: str, prompt: str) -> str:
    """The picture as SVG: a bar for the feed-forward of each layer and one for its heads, what is left of them filled;
    below, what both models write."""
    by_kind = {kind: [block for block in plan.blocks if block.kind == kind] for kind in ("channels", "heads")}
    step = (_WIDTH - 2 * _LEFT) / len(by_kind["channels"])
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(name)}: what is left of each layer, and a text before and after</title>",
        f'<style>{_STYLE}</style><rect class="paper" width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="title" x="{_LEFT}" y="26">{escape(name)}, {result.removed_share:.0%} of all parameters'
        f" removed: {result.model('dense').parameters / 1e6:.0f}M → {result.final.parameters / 1e6:.0f}M</text>",
        f'<text class="label" x="{_LEFT}" y="50">Feed-forward channels of each layer, first to last: kept, and'
        " removed</text>",
    ]
    for kind, top, height in (("channels", _TOP, _BARS), ("heads", _TOP + _BARS + 26, _HEADS)):
        for number, block in enumerate(by_kind[kind]):
            x, kept = _LEFT + number * step, height * len(block.kept) / block.groups
            box = f'x="{x:.1f}" width="{step - 3:.1f}"'
            lines.append(f'<rect class="gone" {box} y="{top}" height="{height}"/>')
            lines.append(f'<rect class="kept" {box} y="{top + height - kept:.1f}" height="{kept:.1f}"/>')
    lines.append(f'<text class="label" x="{_LEFT}" y="{_TOP + _BARS + 18}">Attention heads</text>')
    y = _TOP + _BARS + _HEADS + 52
    for model in result.models:
        title = {"dense": "Original", "pruned": "Pruned"}[model.role]
        written = re.sub("```(python)?", "", model.abilities.writes[prompt])
        text = textwrap.shorten(written, 210, placeholder=" …")
        asked = f" (asked: {prompt})" if model.role == "dense" else ""
        lines.append(f'<text x="{_LEFT}" y="{y}"><tspan font-weight="bold">{title}</tspan>{escape(asked)}</text>')
        for part in textwrap.wrap(text, 108):
            y += 19
            lines.append(f'<text class="label" x="{_LEFT}" y="{y}">{escape(part)}</text>')
        y += 27
    return "\n".join([*lines, "</svg>", ""])


def main(
    run: Path,
    /,
    *,
    name: str = "SmolLM2-135M",
    prompt: str = "Write a Python function that returns the largest number of a list.",
) -> None:
    """Draws the picture."""
    result = RunResult.model_validate_json((run / "result.json").read_bytes())
    PICTURE.write_text(draw(result, PruningPlan.load(run / "plan.json"), name, prompt), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
