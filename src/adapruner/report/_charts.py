"""The charts for the templates: marks at percentages of a plot's width and height, without scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapruner.search._result import SearchResult


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
    series: dict[str, list[Mark]]
    line: list[tuple[float, float]]
    line_name: str


def trials(search: SearchResult) -> Scatter:
    """The loss of every trial in the order of their beginning, and the best so far."""
    known = [(point, point.loss) for point in search.points if point.loss is not None]
    x = Axis.over("trial", [point.number for point, _ in known])
    y = Axis.over("loss, nats per token", [loss for _, loss in known])
    kinds = "stopped early", "proposed by the sampler", "starting point", "fixed metric", "chosen"
    series: dict[str, list[Mark]] = {kind: [] for kind in kinds}
    line, best = list[tuple[float, float]](), math.inf
    for point, loss in known:
        if point.stopped:
            kind = "stopped early"
        elif point.fixed_metric:
            kind = "fixed metric"
        else:
            kind = "starting point" if point.starting_point else "proposed by the sampler"
        label = f"trial {point.number}, {point.fixed_metric or kind}: {loss:.4f}"
        mark = Mark(x.place(point.number), 100 - y.place(loss), label)
        series[kind].append(mark)
        if point.number == search.best_trial:
            series["chosen"].append(mark)
        before, best = best, best if point.stopped else min(best, loss)
        line += [(mark.x, 100 - y.place(height)) for height in (before, best) if math.isfinite(height)]
    return Scatter(x, y, {kind: marks for kind, marks in series.items() if marks}, line, "best so far")


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
