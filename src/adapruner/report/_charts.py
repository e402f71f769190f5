"""The charts for the templates: marks at percentages of a plot's width and height, without scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from adapruner.search._history import TriedPoint
from adapruner.search._result import SearchResult

LOSS_NAME = "loss, nats per token"


@dataclass(frozen=True)
class Mark:
    """A point of a plot: percentages from the left and from the top, and a label."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Axis:
    """One side of a plot.

    Attributes:
        ticks: percentages from its least value, and the numbers written there.
    """

    title: str
    least: float
    most: float
    ticks: tuple[tuple[float, str], ...]

    @classmethod
    def over(cls, title: str, values: Sequence[float]) -> Axis:
        """An axis with some room around finite values, and ticks at round numbers."""
        span = max(values) - min(values) or abs(max(values)) or 1.0
        room = 0.04 * span if max(values) > min(values) else span / 2
        least, most = min(values) - room, max(values) + room
        power = 10.0 ** math.floor(math.log10(span / 4))
        step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 5)
        digits = max(0, -math.floor(math.log10(step)))
        numbers = [number * step for number in range(math.ceil(least / step), math.floor(most / step) + 1)]
        ticks = tuple((_percent(number, least, most), f"{number:,.{digits}f}") for number in numbers)
        return cls(title, least, most, ticks)

    def place(self, value: float) -> float:
        return _percent(value, self.least, self.most)


@dataclass(frozen=True)
class Scatter:
    """Points of several kinds over two axes.

    Attributes:
        series: the marks of each kind, by its name in the legend.
        line: a line through the plot, in the same percentages.
        line_name: its name in the legend.
    """

    x: Axis
    y: Axis
    series: dict[str, tuple[Mark, ...]]
    line: tuple[tuple[float, float], ...] = ()
    line_name: str = ""


def scatter(x: str, y: str, points: Mapping[str, Sequence[tuple[float, float, str]]]) -> Scatter:
    """A plot of points.

    Args:
        x, y: the titles of the axes.
        points: x, y and a label, by the name of their kind; finite, at least one.
    """
    all_points = [point for kind in points.values() for point in kind]
    across, up = Axis.over(x, [point[0] for point in all_points]), Axis.over(y, [point[1] for point in all_points])
    marks = {
        name: tuple(Mark(across.place(left), 100 - up.place(height), label) for left, height, label in kind)
        for name, kind in points.items()
        if kind
    }
    return Scatter(across, up, marks)


def trials(search: SearchResult) -> Scatter:
    """The loss of every trial in the order of their beginning, and the best so far."""
    known = [(point, point.loss) for point in search.points if point.loss is not None]
    kinds: dict[str, list[tuple[float, float, str]]] = {name: [] for name in (*_KINDS, "chosen")}
    for point, loss in known:
        kind = _kind(point)
        mark = point.number, loss, f"trial {point.number}, {point.fixed_metric or kind}: {loss:.4f}"
        kinds[kind].append(mark)
        if point.number == search.best_trial:
            kinds["chosen"].append(mark)
    plot = scatter("trial", LOSS_NAME, kinds)
    best = list(accumulate((math.inf if point.stopped else loss for point, loss in known), min))
    corners = [
        (plot.x.place(point.number), 100 - plot.y.place(loss))
        for (point, _), before, now in zip(known, [math.inf, *best], best, strict=False)
        for loss in (before, now)
        if math.isfinite(loss)
    ]
    return replace(plot, line=tuple(corners), line_name="best so far")


_KINDS = ("stopped early", "proposed by the sampler", "starting point", "fixed metric")


def _kind(point: TriedPoint) -> str:
    if point.stopped:
        return "stopped early"
    if point.fixed_metric:
        return "fixed metric"
    return "starting point" if point.starting_point else "proposed by the sampler"


def strips(search: SearchResult) -> dict[str, dict[str, list[Mark]]]:
    """The trials on the range of every searched parameter, by their kind: `other`, `best quarter` or `chosen`. The most
    important parameter is first. Empty if no trial was placed in the space."""
    tried = sorted(
        ((point.loss, point) for point in search.points if point.positions and point.loss is not None),
        key=lambda entry: entry[0],
    )
    quarter = math.ceil(len(tried) / 4)
    names = [name for name in search.importance or search.ranges if name in search.ranges]
    marks: dict[str, dict[str, list[Mark]]] = {name: {} for name in names}
    for rank, (loss, point) in reversed(list(enumerate(tried))):  # the best on top
        kind = "chosen" if point.number == search.best_trial else "best quarter" if rank < quarter else "other"
        for name in marks.keys() & point.positions.keys():
            label = f"trial {point.number}, loss {loss:.4f}: {described(point.parameters[name])}"
            marks[name].setdefault(kind, []).append(Mark(100 * point.positions[name], 50, label))
    return marks if tried else {}


def described(value: float | int | str | tuple[float | int, ...]) -> str:
    """A name, or a number with three digits, as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return ", ".join(map(described, value))
    return f"{value:.3g}".replace("-", "−") if isinstance(value, float) else str(value).replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as text, in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _percent(value: float, least: float, most: float) -> float:
    return round(100 * (value - least) / (most - least), 2)
