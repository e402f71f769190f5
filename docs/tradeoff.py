"""Draws quality against size and speed: `python docs/tradeoff.py` makes docs/images/tradeoff.svg of tradeoff.json."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

_IMAGES = Path(__file__).with_name("images")
_MARGIN, _PANEL, _GAP, _TOP, _PLOT = 62, 360, 70, 40, 240
_COLOURS = ("#2a6fb0", "#c4542d", "#3a8f4f")
_AXES = {
    "megabytes": ("file size, MB (smaller is better)", (80, 280), (100, 150, 200, 250)),
    "prompt_tokens_per_second": ("prompt tokens/s (larger is better)", (300, 740), (300, 400, 500, 600, 700)),
}
_BITS = ((1.15, 1.31), (1.15, 1.20, 1.25, 1.30))
_STYLE = (
    "text{font:12px sans-serif;fill:#1c2833}.middle{text-anchor:middle}.end{text-anchor:end}.grid{stroke:#d5dbe1}"
    ".paper{fill:#fff}polyline{fill:none;stroke-width:2}.mark{paint-order:stroke;stroke:#fff;stroke-width:3}"
)


def draw(content: dict[str, Any]) -> str:
    """The picture as SVG: a panel for size and one for speed, a line for each model, a mark for each precision."""
    models = content["models"]
    width, height = _MARGIN + 2 * _PANEL + _GAP + 20, _TOP + _PLOT + 56
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>Bits per byte against file size and prompt speed: {escape(', '.join(models))}</title>",
        f'<style>{_STYLE}</style><rect class="paper" width="{width}" height="{height}"/>',
    ]
    for number, (model, colour) in enumerate(zip(models, _COLOURS, strict=True)):
        x = _MARGIN + 170 * number
        lines.append(
            f'<circle cx="{x}" cy="16" r="5" fill="{colour}"/><text x="{x + 12}" y="20">{escape(model)}</text>'
        )
    lines.append(f'<text x="{_MARGIN + 530}" y="20">16, 8, 4: bits per weight</text>')
    for panel, (quantity, (title, reach, ticks)) in enumerate(_AXES.items()):
        left = _MARGIN + panel * (_PANEL + _GAP)
        lines += _grid(left, title, reach, ticks)
        drawn = [
            shape
            for points, colour in zip(models.values(), _COLOURS, strict=True)
            for shape in _line(left, quantity, reach, points, colour)
        ]
        lines += sorted(drawn, key=lambda shape: shape.startswith("<text"))  # numbers over all lines
    return "\n".join([*lines, "</svg>", ""])


def _grid(left: int, title: str, reach: tuple[float, float], ticks: tuple[float, ...]) -> list[str]:
    bottom = _TOP + _PLOT
    lines = [f'<text class="middle" x="{left + _PANEL // 2}" y="{bottom + 42}">{title}</text>']
    for tick in ticks:
        x = left + _share(tick, reach) * _PANEL
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        lines.append(f'<text class="middle" x="{x:.1f}" y="{bottom + 18}">{tick:g}</text>')
    for tick in _BITS[1]:
        y = _height(tick)
        lines.append(f'<line class="grid" x1="{left}" x2="{left + _PANEL}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="end" x="{left - 6}" y="{y + 4:.1f}">{tick:.2f}</text>')
    lines.append(f'<text x="{left - 40}" y="{_TOP - 6}">bits per byte (lower is better)</text>')
    return lines


def _line(
    left: int, quantity: str, reach: tuple[float, float], points: dict[str, dict[str, float]], colour: str
) -> list[str]:
    places = {
        name: (left + _share(point[quantity], reach) * _PANEL, _height(point["bits_per_byte"]))
        for name, point in points.items()
    }
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places.values())
    lines = [f'<polyline points="{path}" stroke="{colour}"/>']
    for name, (x, y) in places.items():
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        bits = name.removesuffix(" bits")
        lines.append(f'<text class="mark middle" x="{x:.1f}" y="{y - 9:.1f}">{bits}</text>')
    return lines


def _share(value: float, reach: tuple[float, float]) -> float:
    return (value - reach[0]) / (reach[1] - reach[0])


def _height(bits: float) -> float:
    """Fewer bits per byte stand lower."""
    return _TOP + _PLOT * (1 - _share(bits, _BITS[0]))


if __name__ == "__main__":
    picture = draw(json.loads((_IMAGES / "tradeoff.json").read_text(encoding="utf-8")))
    (_IMAGES / "tradeoff.svg").write_text(picture, encoding="utf-8")
