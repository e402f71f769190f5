"""The page of a comparison of models."""

from __future__ import annotations

from adapruner.comparison import AXES, Axis, Comparison, table
from adapruner.numbers import shortened
from adapruner.report._charts import Scatter, scatter
from adapruner.report._page import render


def render_comparison(comparison: Comparison) -> str:
    """The page, as text."""
    return render(
        "comparison.html.jinja",
        plots={axis: _quality_against(comparison, axis) for axis in AXES},
        points={point.name: point for point in comparison.points},
        comparison=comparison,
        models=dict.fromkeys(point.model for point in comparison.points),
        numbers=table(comparison),
    )


def _quality_against(comparison: Comparison, axis: Axis) -> Scatter:
    """Bits per byte against size or speed, a series for every model and engine."""
    title = "MB" if axis == "size" else AXES[axis]
    points: dict[str, list[tuple[float, float, str]]] = {}
    for point in comparison.points:
        cost = point.size / 1e6 if axis == "size" else getattr(point, axis).median
        points.setdefault(f"{shortened(point.model)}, {point.engine}", []).append(
            (cost, point.bits_per_byte, point.name)
        )
    return scatter(title, "bits per byte", points)
