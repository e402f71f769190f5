"""Draws the graph of a run as the code declares it: `python docs/graph.py` writes docs/images/graph.svg.

What a run keeps stands from top to bottom, with lines from what it is made of; results have another colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from adapruner.graph.nodes import Graph, Kept
from adapruner.run.models import GRAPH

_WIDTH, _HEIGHT, _BESIDE, _BELOW, _MARGIN = 158, 26, 36, 24, 16
_STYLE = (
    "rect{fill:#fff;stroke:#5b6b7b;rx:5}.result{fill:#e8f1fb;stroke:#2a6fb0}"
    "text{font:12px sans-serif;fill:#1c2833;text-anchor:middle}path{fill:none;stroke:#8a99a8;stroke-width:1}"
    "@media(prefers-color-scheme:dark){rect{fill:#22303c}.result{fill:#17375a}text{fill:#e6edf3}}"
)


def rows(graph: Graph) -> list[list[Kept[object]]]:
    """What a run keeps by the longest way from something that needs nothing else that is kept."""
    depth: dict[str, int] = {}
    for node in graph.kept_nodes:
        depth[node.name] = max((depth[name] + 1 for name in graph.inputs_of_key(node.name).kept), default=0)
    return [[node for node in graph.kept_nodes if depth[node.name] == row] for row in range(max(depth.values()) + 1)]


def arrows(graph: Graph) -> list[tuple[str, str]]:
    """From every kept node to those that are made from it, where nothing in between says so already."""
    kept = {node.name: graph.inputs_of_key(node.name).kept for node in graph.kept_nodes}
    behind = {
        name: frozenset[str]().union(*(kept[each] | behind_of(each, kept) for each in kept[name])) for name in kept
    }
    return [(source, name) for name in kept for source in sorted(kept[name] - behind[name])]


def behind_of(name: str, kept: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """All kept nodes that a kept node is made from, directly or not."""
    return kept[name].union(*(behind_of(each, kept) for each in kept[name]))


def draw(graph: Graph) -> str:
    """The picture as SVG."""
    placed = rows(graph)
    widest = max(map(len, placed))
    place = {
        node.name: (
            _MARGIN + int((column + (widest - len(nodes)) / 2) * (_WIDTH + _BESIDE)),
            _MARGIN + row * (_HEIGHT + _BELOW),
        )
        for row, nodes in enumerate(placed)
        for column, node in enumerate(nodes)
    }
    width = max(x for x, _ in place.values()) + _WIDTH + _MARGIN
    height = max(y for _, y in place.values()) + _HEIGHT + _MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>What a run keeps, and what each is made from</title><style>{_STYLE}</style>",
    ]
    for source, name in arrows(graph):
        (x, y), (start, above) = place[name], place[source]
        begin, end, top = start + _WIDTH // 2, x + _WIDTH // 2, above + _HEIGHT
        middle = (top + y) // 2
        lines.append(f'<path d="M{begin} {top}C{begin} {middle} {end} {middle} {end} {y}"/>')
    for node in graph.kept_nodes:
        x, y = place[node.name]
        kind = ' class="result"' if node.is_result else ""
        label = escape(node.path.removeprefix("evaluation/").rsplit(".", 1)[0])
        lines.append(f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}"{kind}/>')
        lines.append(f'<text x="{x + _WIDTH // 2}" y="{y + 17}">{label}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("images").joinpath("graph.svg").write_text(draw(GRAPH), encoding="utf-8")
