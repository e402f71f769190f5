"""The page of a comparison of models."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from adapruner.comparison import AXES, Axis, Comparison, Point, protocols, table
from adapruner.files import being_written
from adapruner.report._figures import shortened, styled
from adapruner.report._page import render

# Colours that can be read on white and on near black.
_COLOURS = ("#8b94a3", "#3d7fd9", "#17a08c", "#c08a3e", "#b05fb3", "#c65353", "#5f7f3a", "#6a5acd")


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Writes a self-contained page.

    Raises:
        AdaPrunerError: it cannot be written.
    """
    with being_written(path) as partial:
        partial.write_text(render_comparison(comparison), encoding="utf-8")


def render_comparison(comparison: Comparison) -> str:
    """The page, as text."""
    header, rows = table(comparison)
    return render(
        "comparison.html.jinja",
        {axis: _quality_against(comparison, axis) for axis in AXES},
        comparison=comparison,
        models=_models(comparison.points),
        header=header,
        rows=rows,
        protocols=protocols(comparison),
    )


def _models(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.model for point in points))


def _quality_against(comparison: Comparison, axis: Axis) -> go.Figure:
    """The points of every model and engine, by size with a line through them; what is dominated is hollow."""
    figure = go.Figure()
    models, dominated = _models(comparison.points), comparison.dominated
    by_line: dict[tuple[str, str], list[Point]] = {}
    for point in comparison.points:
        by_line.setdefault((point.model, point.engine), []).append(point)
    for (model, engine), points in by_line.items():
        name = html.escape(shortened(model), quote=False)
        figure.add_scatter(
            x=[point.size / 1e6 if axis == "size" else getattr(point, axis).median for point in points],
            y=[point.bits_per_byte for point in points],
            name=name if len(by_line) == len(models) else f"{name}, {engine}",
            mode="lines+markers+text" if axis == "size" else "markers+text",
            text=[point.type for point in points],
            textposition="top center",
            line={
                "color": _COLOURS[models.index(model) % len(_COLOURS)],
                "width": 1,
                "dash": "dot" if engine == "transformers" else "solid",
            },
            marker={
                "size": 11,
                "symbol": ["circle-open" if axis in dominated.get(point.name, {}) else "circle" for point in points],
                "line": {"width": 2},
            },
            hovertemplate=f"{name} %{{text}}: %{{y:.4f}} bits per byte, %{{x:,.1f}}<extra></extra>",
            cliponaxis=False,
        )
    figure.update_xaxes(title_text="MB" if axis == "size" else AXES[axis], zeroline=False)
    figure.update_yaxes(title_text="bits per byte", zeroline=False)
    return styled(figure, 420)
