"""The page of a finished run, as self-contained HTML: tables, the loss by position, commands that may follow."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from adapruner.base.progress import printable
from adapruner.base.tables import Cell, Cells, Column, Table
from adapruner.budget.plan import PruningPlan
from adapruner.evaluation.speed import Rate, Speed
from adapruner.options import PruneConfig, PruneOptions
from adapruner.report.result import (
    ModelNumbers,
    RunResult,
    advice_on,
    difference,
    is_noise,
    shortened,
    shown_name,
    signed,
    tables_of,
    with_error,
)
from adapruner.structure.blocks import show_layers
from adapruner.text.blends import assign_texts


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
class Curve:
    """Points over two axes, and the line through them."""

    x: Axis
    y: Axis
    marks: list[Mark]


def positions(dense: ModelNumbers, final: ModelNumbers) -> dict[str, Curve]:
    """By text in long windows, the perplexity over that of the dense model against the position in a window."""
    plots = {}
    for text, after in final.perplexity.items():
        before = dense.perplexity[text].by_position
        places = [*before, after.seq_len]
        ratios = [math.exp(after.by_position[place] - before[place]) for place in before]
        if not ratios or not all(map(math.isfinite, ratios)):
            continue
        names = [f"{begin:,}–{end - 1:,}" for begin, end in pairwise(places)]
        step, y = 100 / len(names), Axis.over("perplexity, × dense", [1.0, *ratios])
        ticks = tuple(((number + 0.5) * step, name) for number, name in enumerate(names))
        x, shown = Axis("position of the token", 0, len(names), ticks), zip(ticks, ratios, strict=True)
        marks = [Mark(place, 100 - y.place(ratio), f"{name}: × {ratio:.3f}") for (place, name), ratio in shown]
        plots[text] = Curve(x, y, marks)
    return plots


def duration(seconds: float) -> str:
    """Seconds as text, in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _percent(value: float, least: float, most: float) -> float:
    return round(100 * (value - least) / (most - least), 2)


def losses(dense: ModelNumbers, final: ModelNumbers) -> Table:
    """The losses of quality against the dense model, as far as they were measured."""
    rows, numbers, tasks = list[Cells](), dense.numbers, list(final.tasks)
    for before, after in ((numbers[key], after) for key, after in final.numbers.items() if key in numbers):
        label, about, (rise, error) = after.metric, after.dataset, difference(before, after)
        change, noise = signed(rise, None, after.digits).text, is_noise(rise, error)
        if after.kind == "text" and after.metric == "perplexity":
            change = _times(before.value, after.value)
        elif after.kind == "mean":
            about = f"{len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
            label = f"mean {label}" if len(tasks) > 1 else label
        elif after.kind != "text":
            continue
        rows.append(_change(label, about, before.cell, after.cell, change, noise))
    return Table("loss-table", "Losses", _COLUMNS_OF_CHANGES, rows)


def gains(result: RunResult, weight_bytes: int, speed: tuple[Speed, Speed] | None) -> Table:
    """The savings of the final model.

    Args:
        weight_bytes: size of its weights on disk.
        speed: of the dense and the final model.
    """
    before, after = result.model("dense").parameters, result.final.parameters
    shown = [f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}" for number in (before, after)]
    growth = f"{100 * after / before - 100:+.1f} %".replace("-", "−")
    rows = [_change("parameters", "", Cell(shown[0]), Cell(shown[1]), growth)]
    if weight_bytes:
        dense_bytes = weight_bytes + result.removed_bytes
        rows.append(_smaller("weights on disk", "in the same dtype", _megabytes, dense_bytes, weight_bytes))
    if speed:
        rows += _gains_of_speed(*speed)
    return Table("gain-table", "Gains", _COLUMNS_OF_CHANGES, rows)


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


_COLUMNS_OF_CHANGES = [
    Column("measured", is_number=False),
    Column("dense"),
    Column("pruned"),
    Column("change", style="change"),
]


def _change(label: str, about: str, before: Cell, after: Cell, change: str, noise: bool = False) -> Cells:
    remark = "within noise" if noise else ""
    return [Cell(label, detail=shortened(about)), before, after, Cell(change, remark, is_noise=noise)]


def _smaller(label: str, about: str, show: Callable[[int], str], before: int, after: int) -> Cells:
    change = f"{100 * after / before - 100:+.1f} %".replace("-", "−")
    return _change(label, about, Cell(show(before)), Cell(show(after)), change)


def texts(models: Mapping[str, ModelNumbers]) -> Table:
    """What the models wrote greedily after the same prompts, side by side.

    Args:
        models: by the name that is shown.
    """
    written = {name: model.abilities.writes for name, model in models.items()}
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


def _rate(rate: Rate) -> Cell:
    return Cell(f"{rate.median:,.0f}", f"{rate.least:,.0f}–{rate.greatest:,.0f}")


def _times(before: float, after: float) -> str:
    return f"× {after / before:.2f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


# The folder of the search, if a run took it from another run.
_SEARCHED = "runs/searched"


def command(config: PruneConfig, output: Path) -> str:
    """The command line, one option a line, with the options that were given; two commands if the run
    took the search of another one, at another ratio."""
    if config.searched is not None:
        searched = config.model_copy(update={"ratio": config.searched, "searched": None})
        again = ("adapruner", "prune", "--from", _SEARCHED, "--ratio", str(config.ratio), "-o", str(output))
        return f"{command(searched, Path(_SEARCHED))}\n{shlex.join(again)}"
    lines: list[tuple[str, ...]] = [("adapruner", "prune", config.model, "-o", str(output))]
    given = config.given or config.model_fields_set
    for field in (field for field in PruneOptions.model_fields if field in given):
        value, name = getattr(config, field), field.strip("_").replace("_", "-")
        if isinstance(value, bool):
            lines.append((f"--{name}" if value else f"--no-{name}",))
        elif value is not None:
            lines += [(f"--{name}", str(entry)) for entry in (value if isinstance(value, tuple) else (value,))]
    return " \\\n    ".join(map(shlex.join, lines))


def next_commands(result: RunResult, folder: Path, has_speed: bool) -> dict[str, str]:
    """Command lines to continue with a finished run, by their purpose.

    Args:
        has_speed: the speed of its model was measured.
    """
    config, model = result.config, folder / "model"
    commands: dict[str, tuple[str, ...]] = {"Train on, as long again": ("recover", str(folder))}
    if not config.tasks:
        commands["Measure tasks"] = ("evaluate", str(model), "--tasks", "commonsense")
    if not has_speed:
        commands["Measure the speed on this machine, and show it here"] = (
            *("benchmark", str(model), "--against", config.model, "-o", str(folder / "speed.json")),
        )
    commands["Export for llama.cpp"] = ("export", str(model), "--to", "gguf", "-o", str(folder / "model.gguf"))
    return {purpose: shlex.join(("adapruner", *words)) for purpose, words in commands.items()}


# Whatever a text contains: nothing is run and nothing is fetched.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_TEMPLATES = Environment(
    loader=PackageLoader("adapruner.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"duration": duration, "show_layers": show_layers}


def render_report(
    folder: Path,
    result: RunResult,
    plan: PruningPlan,
    samples: Mapping[int, str | None],
    speed: tuple[Speed, Speed] | None,
) -> str:
    """The page of a finished run, as text.

    Args:
        folder: of the run; its pruned model is in `model/`.
        samples: the texts of the calibration samples that were chosen, by their numbers in the pool; None for those
            that are not at hand.
        speed: of the dense and the pruned model, if it was measured.
    """
    config, search, dense, final = result.config, result.search, result.model("dense"), result.final
    weight_bytes = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    used: dict[str, list[str]] = defaultdict(list)
    for use, text in assign_texts(config).used if final.perplexity else ():
        used[use].append(str(text))
    page = _TEMPLATES.get_template("report.html.jinja").render(
        policy=_POLICY,
        folder=folder,
        config=config,
        plan=plan,
        result=result,
        search=search,
        dense=dense,
        final=final,
        name=shown_name(config.model),
        losses=losses(dense, final),
        gains=gains(result, weight_bytes, speed),
        speed=speed,
        samples=samples,
        used={use: ", ".join(texts) for use, texts in used.items()},
        advice=advice_on(result),
        next_commands=next_commands(result, folder, speed is not None),
        model_tables=tables_of("Numbers of every model", result.models),
        texts=texts({model.role: model for model in result.models}),
        positions=positions(dense, final),
        costs=costs(result, plan),
        command=command(config, folder),
        options=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    )
    return printable(page)
