"""The page: what there is of a run, as self-contained HTML."""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import plotly.graph_objects as go
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from adapruner.config import PruneConfig
from adapruner.files import being_written
from adapruner.planning import PruningPlan
from adapruner.report import _figures
from adapruner.report._command import command
from adapruner.report._contents import Contents, read_contents
from adapruner.report._words import KINDS, LOSS_NAMES, described, shortened
from adapruner.result import TITLES, ModelNumbers, shown_name, titles
from adapruner.run import RunFolder


@dataclass(frozen=True)
class Headline:
    """One of the numbers at the top of the page."""

    label: str
    value: str
    note: str
    error: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """How much of a layer stays: kept and all, by kind."""

    layer: int
    kept: dict[str, tuple[int, int]]


def write_reports(run: RunFolder, refresh: int | None = None) -> list[Path]:
    """Writes `report.html` for every ratio: all that there is of a run, finished or not.

    Args:
        refresh: seconds after which the page reloads, while the run is in progress.

    Raises:
        AdaPrunerError: the folder holds no run, or cannot be written.
    """
    config, written = run.read_config(), []
    for ratio in config.ratio:
        report = run.at_ratio(ratio, config).report
        page = render_report(run, config.model_copy(update={"ratio": (ratio,)}), refresh)
        # The run itself may be writing it too.
        with being_written(report, ".other") as partial:
            partial.write_text(page, encoding="utf-8")
        written.append(report)
    return written


def render_report(run: RunFolder, config: PruneConfig, refresh: int | None = None) -> str:
    """The page of one ratio, as text.

    Args:
        config: the options of the run, with this ratio alone.
    """
    return render(read_contents(run, config), refresh)


def render(contents: Contents, refresh: int | None = None) -> str:
    """The page as text."""
    environment = _environment()
    scripts = [get_plotlyjs(), environment.get_template("report.js").render()]
    names = titles(contents.config, contents.search.best_fixed_name if contents.search else None)
    return environment.get_template("report.html.jinja").render(
        contents=contents,
        refresh=refresh if contents.state == "running" else None,
        # Whatever a text may smuggle in: nothing is run but these scripts, and nothing is fetched.
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "
        + " ".join(map(_script_hash, scripts)),
        scripts=[Markup(script) for script in scripts],
        titles=names,
        name=shown_name(contents.config.model),
        metrics=_mean_metrics(contents),
        headlines=_headlines(contents),
        means={model.role: _means(model) for model in contents.models},
        layers=_layer_rows(contents.plan) if contents.plan else [],
        kinds=KINDS,
        loss_name=LOSS_NAMES[contents.config.selection],
        mix=_mix(contents),
        allocation=asdict(contents.search.best.budget) if contents.search else {},
        figures={name: _figures.as_json(figure) for name, figure in _all_figures(contents).items()},
        sizes=_sizes(contents),
        command=command(contents.config, contents.path),
        options=yaml.safe_dump(contents.config.model_dump(mode="json"), sort_keys=False),
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("adapruner.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "described": described,
        "perplexity_error": _figures.perplexity_error,
        "shortened": shortened,
    }
    return environment


def _script_hash(script: str) -> str:
    """Of an inline script, for a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _all_figures(contents: Contents) -> dict[str, go.Figure]:
    """The charts that there is something to draw in."""
    history, chosen = contents.history, contents.search.best_trial if contents.search else None
    figures: dict[str, go.Figure] = {}
    if contents.dense and contents.dense.perplexity:
        figures["perplexity"] = _figures.perplexities(contents.models)
    if accuracies := _figures.accuracies(contents.models):
        figures["accuracy"] = accuracies
    if contents.plan:
        figures["removed"] = _figures.removed_by_layer(contents.plan)
    if any(point.loss is not None for point in history.points):
        figures["trials"] = _figures.trials(history, chosen, contents.config.selection)
    if history.importance:
        figures["importance"] = _figures.importance(history)
    if any(point.positions and point.loss is not None for point in history.points):
        figures["parallel"] = _figures.parallel_coordinates(history, chosen)
    return figures


def _mean_metrics(contents: Contents) -> list[str]:
    return list(contents.dense.mean_accuracies) if contents.dense else []


def _means(model: ModelNumbers) -> dict[str, tuple[float, float | None]]:
    """Mean accuracies with their standard errors, from those of the tasks, which are independent of each other."""
    means = {}
    for metric, value in model.mean_accuracies.items():
        scores = model.tasks.values()
        errors = [score.standard_errors.get(metric if metric in score.metrics else "acc") for score in scores]
        known = [error for error in errors if error is not None]
        means[metric] = value, math.hypot(*known) / len(errors) if len(known) == len(errors) else None
    return means


def _headlines(contents: Contents) -> list[Headline]:
    headlines = []
    if contents.dense and contents.final:
        before, after = contents.dense.parameters, contents.final.parameters
        headlines.append(Headline("parameters", f"−{100 - 100 * after / before:.1f} %", f"{before:,} → {after:,}"))
        for text, number in contents.final.perplexity.items():
            dense, final = contents.dense.perplexity[text].perplexity, number.perplexity
            headlines.append(
                Headline(f"perplexity, {shortened(text)}", f"{final:.2f}", f"dense {dense:.2f}, × {final / dense:.2f}")
            )
        for metric, (mean, error) in list(_means(contents.final).items())[:1]:
            of_dense, error_of_dense = _means(contents.dense)[metric]
            count = len(contents.final.tasks)
            which = f"mean {metric} of {count} tasks" if count > 1 else metric
            note = f"dense {of_dense:.3f}" + ("" if error_of_dense is None else f" ± {error_of_dense:.3f}")
            headlines.append(Headline(which, f"{mean:.3f}", note, error))
    if contents.stages:
        seconds = sum(stage.seconds for stage in contents.stages.values())
        peak = max(stage.peak_memory_mib for stage in contents.stages.values())
        headlines.append(Headline("time", _duration(seconds), f"peak memory {peak / 1024:,.2f} GiB"))
    return headlines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _layer_rows(plan: PruningPlan) -> list[LayerRow]:
    rows: dict[int, LayerRow] = {}
    for block in plan.blocks:
        row = rows.setdefault(block.layer, LayerRow(block.layer, {}))
        row.kept[block.kind] = (len(block.kept), block.groups)
    return list(rows.values())


def _mix(contents: Contents) -> dict[str, float]:
    """The shares of the importance terms in the chosen metric."""
    weights = contents.search.best.point.weights if contents.search else {}
    total = sum(weights.values())
    return {name: weight / total for name, weight in sorted(weights.items(), key=lambda item: -item[1]) if weight}


def _sizes(contents: Contents) -> list[tuple[str, int, float]]:
    """Title, parameters and bytes of the weights; those of the dense model in the dtype of the saved one."""
    if not contents.weight_bytes or not contents.dense or not contents.final:
        return []
    before, after = contents.dense.parameters, contents.final.parameters
    return [
        ("dense", before, before * contents.weight_bytes / after),
        (TITLES[contents.final.role], after, contents.weight_bytes),
    ]
