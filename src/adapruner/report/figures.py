"""Charts and tables of the page: marks at percentages of a plot, and the final model beside the dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from adapruner.base.tables import BARS, Cell, Cells, Column, Table, whiskers
from adapruner.budget.plan import PruningPlan
from adapruner.evaluation.speed import Rate, Speed
from adapruner.report.numbers import difference, is_noise, shortened, signed, with_error
from adapruner.report.result import ModelNumbers, Role, RunResult, titles
from adapruner.search.result import SearchResult


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


def losses(dense: ModelNumbers, final: ModelNumbers, final_name: str) -> Table:
    """The losses of quality against the dense model, as far as they were measured."""
    rows, numbers, tasks = list[Cells](), dense.numbers, list(final.tasks)
    for before, after in ((numbers[key], after) for key, after in final.numbers.items() if key in numbers):
        label, about, (rise, error) = after.metric, after.dataset, difference(before, after)
        change, noise = signed(rise, None, after.digits).text, is_noise(rise, error)
        if after.kind == "text" and after.metric == "perplexity":
            # The loss is the logarithm of the perplexity; errors of the loss are symmetric.
            errors = (number.error and number.error / number.value for number in (before, after))
            change, noise = _times(before.value, after.value), is_noise(math.log(after.value / before.value), *errors)
        elif after.kind == "mean":
            about = f"{len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
            label = f"mean {label}" if len(tasks) > 1 else label
        elif after.metric == "solved":
            about = "of built-in tasks"
        elif after.kind != "text":
            continue
        rows.append(_change(label, about, before.cell, after.cell, change, noise))
    return Table("loss-table", "Losses", _columns_of_changes(final_name), rows)


def gains(
    dense: ModelNumbers, final: ModelNumbers, final_name: str, weight_bytes: int, speed: tuple[Speed, Speed] | None
) -> Table:
    """The savings of the final model.

    Args:
        weight_bytes: size of its weights on disk.
        speed: of the dense and the final model.
    """
    before, after = dense.parameters, final.parameters
    rows = [_smaller("parameters", "", _millions, before, after)]
    if weight_bytes:
        dense_bytes = round(weight_bytes * before / after)
        rows.append(_smaller("weights on disk", "in the same dtype", _megabytes, dense_bytes, weight_bytes))
    if speed:
        rows += _gains_of_speed(*speed)
    return Table("gain-table", "Gains", _columns_of_changes(final_name), rows)


def _gains_of_speed(dense: Speed, final: Speed) -> Iterator[Cells]:
    for label, before, after in (
        ("prompt, tokens per second", dense.prefill, final.prefill),
        ("generation, tokens per second", dense.decode, final.decode),
    ):
        for batch in sorted(before.keys() & after.keys()):
            slow, fast = before[batch], after[batch]
            overlap = slow.least <= fast.greatest and fast.least <= slow.greatest
            factor = _times(slow.median, fast.median)
            yield _change(label, f"batch {batch}", _rate(slow), _rate(fast), factor, overlap)
    if dense.peak_memory_bytes and final.peak_memory_bytes:
        about = f"batch {max(dense.prefill)}"
        yield _smaller("peak memory", about, _megabytes, dense.peak_memory_bytes, final.peak_memory_bytes)


def _columns_of_changes(final_name: str) -> list[Column]:
    return [Column("measured", is_number=False), *map(Column, ("dense", final_name)), Column("change", style="change")]


def _change(label: str, about: str, before: Cell, after: Cell, change: str, noise: bool = False) -> Cells:
    remark = "within noise" if noise else ""
    return [Cell(label, detail=shortened(about)), before, after, Cell(change, remark, is_noise=noise)]


def _smaller(label: str, about: str, show: Callable[[int], str], before: int, after: int) -> Cells:
    change = f"{100 * after / before - 100:+.1f} %".replace("-", "−")
    return _change(label, about, Cell(show(before)), Cell(show(after)), change)


def ladder(result: RunResult) -> Table:
    """Steps from a fixed metric to the saved model: the loss on held-out windows, its gain over the row above on the
    same windows, and bits per byte of the first text that is reported on."""
    rungs = list(_rungs(result))
    text = next(iter(result.final.perplexity), "")
    bits = {model.role: model.numbers.get(("text", "bits per byte", text)) for model in result.models}
    columns = [
        Column("step", is_number=False),
        *map(Column, ("trial", "loss")),
        Column("gain over the row above", style="change"),
        BARS,
        Column(f"bits per byte\n{shortened(text)}" if text else "bits per byte"),
    ]
    rows = []
    for rung, whisker in zip(rungs, whiskers(rung.gain for rung in rungs), strict=True):
        measured = bits.get(rung.role) if rung.role else None
        rows.append(
            [
                rung.name,
                "" if rung.trial is None else str(rung.trial),
                "" if rung.loss is None else f"{rung.loss:.4f}",
                replace(with_error(*rung.gain), is_noise=is_noise(*rung.gain)) if rung.gain else "",
                whisker,
                measured.cell if measured else "",
            ]
        )
    return Table("ladder-table", "What each step is worth", columns, rows)


def texts(models: Mapping[str, ModelNumbers]) -> Table:
    """What the models wrote greedily after the same prompts, side by side.

    Args:
        models: by the name that is shown.
    """
    written = {name: model.abilities.writes for name, model in models.items() if model.abilities}
    columns = [Column(title, is_number=False, style="written") for title in ("prompt", *written)]
    prompts = dict.fromkeys(prompt for texts in written.values() for prompt in texts)
    rows = [[prompt, *(texts.get(prompt, "") for texts in written.values())] for prompt in prompts]
    return Table("text-table", "What the models write", columns, rows)


def costs(result: RunResult, plan: PruningPlan) -> Table | None:
    """What cutting the blocks of each layer costs, as far as it was measured."""
    if not result.costs:
        return None
    kinds, rows = {"heads": "attention", "channels": "feed-forward"}, dict[int, dict[str, Cell]]()
    for number, cost in result.costs.by_block.items():
        block = plan.blocks[number]
        rows.setdefault(block.layer, {})[block.kind] = with_error(cost.nats, cost.standard_error)
    columns = [Column("layer"), *(Column(f"{part}, nats per token") for part in kinds.values())]
    cells: list[Cells] = [
        [str(layer), *(own.get(kind, Cell("")) for kind in kinds)] for layer, own in sorted(rows.items())
    ]
    return Table("cost-table", "What a cut costs", columns, cells)


class _Rung(NamedTuple):
    """A step of the ladder.

    Attributes:
        loss: on held-out windows, in nats per token.
        gain: the difference to the loss of the step before, on the same windows, with its standard error; None if the
            two were not measured on the same windows.
        role: the resulting model, if it was measured.
    """

    name: str
    trial: int | None = None
    loss: float | None = None
    gain: tuple[float, float | None] | None = None
    role: Role | None = None


def _rungs(result: RunResult) -> Iterator[_Rung]:
    search, is_compensated = result.search, result.config.compensation != "none"
    fixed = titles(result)["best_fixed"].removesuffix(", not compensated")
    measured = {model.role for model in result.models if model.perplexity}
    if is_compensated and "best_fixed" in measured:
        yield _Rung(f"{fixed}, not compensated", role="best_fixed")
        fixed = "same metric"
    names = {
        "fixed metric": f"{fixed}, compensated" if is_compensated else fixed,
        "starting point": "best starting point",
        "searched": "best point of the search",
    }
    for step in search.steps if search else ():
        gain = None if step.gain is None else (step.gain, step.standard_error)
        role: Role | None = "best_fixed" if step.name == "fixed metric" and not is_compensated else None
        yield _Rung(names[step.name], step.trial, step.loss, gain, role)
    is_healed = bool(result.healing and result.healing.record)
    done = {"final compensation": is_compensated, "healed": is_healed, "saved": True}
    yield _Rung(", ".join(name for name, is_done in done.items() if is_done), role="searched")
    yield _Rung("dense, to compare with", role="dense")


def _rate(rate: Rate) -> Cell:
    return Cell(f"{rate.median:,.0f}", f"{rate.least:,.0f}–{rate.greatest:,.0f}")


def _times(before: float, after: float) -> str:
    return f"× {after / before:.2f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"
