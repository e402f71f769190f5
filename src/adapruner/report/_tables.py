"""Tables that compare the final model of a run with the dense one, and the steps between the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from adapruner.evaluation._speed import Rate, Speed
from adapruner.numbers import difference, is_noise, shortened, signed, with_error
from adapruner.planning._plan import PruningPlan
from adapruner.result import ModelNumbers, Role, RunResult, titles
from adapruner.tables import BARS, Cell, Cells, Column, Table, whiskers


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
