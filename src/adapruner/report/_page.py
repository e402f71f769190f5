"""The page: what there is of a run, as HTML that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from adapruner.errors import AdaPrunerError
from adapruner.planning import PruningPlan
from adapruner.report import _figures
from adapruner.report._command import command
from adapruner.report._contents import Contents, read_contents
from adapruner.report._words import KINDS, LOSS_NAMES, described, shortened
from adapruner.result import TITLES
from adapruner.run_folder import RunFolder


@dataclass(frozen=True)
class Headline:
    """One of the numbers at the top of the page."""

    label: str
    value: str
    note: str
    error: float | None = None


@dataclass(frozen=True)
class ModelRow:
    """The numbers of one model: perplexities by text, and mean accuracies with their standard errors by metric."""

    title: str
    parameters: int
    perplexities: list[dict[str, Any] | None]
    means: list[tuple[float, float | None] | None]


@dataclass(frozen=True)
class LayerRow:
    """How much of a layer stays: kept and all, by kind."""

    layer: int
    kept: dict[str, tuple[int, int]]


def write_report(run: RunFolder, refresh: int | None = None) -> Path:
    """Writes `report.html`: all that there is of a run, finished or not.

    Args:
        refresh: seconds after which the page reads itself again, while it is written again and again.

    Raises:
        AdaPrunerError: the folder holds no run, or cannot be written.
    """
    page = render(read_contents(run), refresh)
    try:
        run.save_report(page)
    except OSError as error:
        raise AdaPrunerError(f"cannot write {run.report}: {error.strerror}") from None
    return run.report


def render(contents: Contents, refresh: int | None = None) -> str:
    """The page as text."""
    environment = _environment()
    scripts = [get_plotlyjs(), environment.get_template("report.js").render()]
    titles = _titles(contents)
    return environment.get_template("report.html.jinja").render(
        contents=contents,
        refresh=refresh if contents.state == "running" else None,
        # Whatever a text may smuggle in: nothing is run but these scripts, and nothing is fetched.
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "
        + " ".join(map(_script_hash, scripts)),
        scripts=[Markup(script) for script in scripts],
        titles=titles,
        metrics=_mean_metrics(contents),
        headlines=_headlines(contents),
        models=_model_rows(contents, titles),
        layers=_layer_rows(contents.plan) if contents.plan else [],
        kinds=KINDS,
        loss_name=LOSS_NAMES[contents.config.selection],
        mix=_mix(contents),
        allocation=asdict(contents.outcome.best.budget) if contents.outcome else {},
        figures={name: _figures.as_json(figure) for name, figure in _all_figures(contents).items()},
        sizes=_sizes(contents),
        command=command(
            contents.config,
            contents.path,
            None,
            contents.outcome.ratio if contents.outcome else None,
        ),
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


def _titles(contents: Contents) -> dict[str, str]:
    """What the models are called."""
    titles = dict(TITLES)
    if contents.outcome:
        how = "" if contents.config.compensation == "none" else ", not compensated"
        titles["best_fixed"] += f" ({contents.outcome.best_fixed_name}){how}"
    return {name: titles[name] for name in contents.models}


def _all_figures(contents: Contents) -> dict[str, go.Figure]:
    """The charts that there is something to draw in."""
    history, outcome = contents.history, contents.outcome
    chosen = outcome.best_trial if outcome else None
    figures: dict[str, go.Figure] = {}
    if contents.perplexity:
        figures["perplexity"] = _figures.perplexities(contents.perplexity)
    if contents.tasks and (accuracies := _figures.accuracies(contents.tasks, contents.models)):
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


def _parameters(contents: Contents, model: str) -> int | None:
    if contents.result:
        return int(contents.result["parameters"]["before" if model == "dense" else "after"])
    if contents.plan is None:
        return None
    return contents.plan.total_parameters - (0 if model == "dense" else contents.plan.removed_parameters)


def _model_rows(contents: Contents, titles: dict[str, str]) -> list[ModelRow]:
    return [
        ModelRow(
            title,
            parameters,
            [by_model.get(name) for by_model in contents.perplexity.values()],
            [_mean(contents, name, metric) for metric in _mean_metrics(contents)],
        )
        for name, title in titles.items()
        if (parameters := _parameters(contents, name)) is not None
    ]


def _mean_metrics(contents: Contents) -> list[str]:
    return list(next(iter(contents.task_means.values()), {}))


def _mean(contents: Contents, model: str, metric: str) -> tuple[float, float | None] | None:
    """A mean accuracy, and its standard error from those of the tasks, which are independent of each other."""
    value = contents.task_means.get(model, {}).get(metric)
    if value is None:
        return None
    scores = [by_model[model] for by_model in contents.tasks.values()]
    errors = [score["standard_errors"].get(metric if metric in score["metrics"] else "acc") for score in scores]
    return value, None if None in errors else math.hypot(*errors) / len(errors)


def _headlines(contents: Contents) -> list[Headline]:
    before, after = _parameters(contents, "dense"), _parameters(contents, contents.final)
    headlines = []
    if before and after and contents.final != "dense":
        headlines.append(Headline("parameters", f"−{100 - 100 * after / before:.1f} %", f"{before:,} → {after:,}"))
    for text, by_model in contents.perplexity.items():
        if contents.final in by_model and contents.final != "dense":
            dense, final = by_model["dense"]["perplexity"], by_model[contents.final]["perplexity"]
            headlines.append(
                Headline(f"perplexity, {shortened(text)}", f"{final:.2f}", f"dense {dense:.2f}, × {final / dense:.2f}")
            )
    for metric in _mean_metrics(contents)[:1]:
        dense_mean, final_mean = (_mean(contents, name, metric) for name in ("dense", contents.final))
        if dense_mean and final_mean and contents.final != "dense":
            count = len(contents.tasks)
            which = f"mean {metric} of {count} tasks" if count > 1 else metric
            note = f"dense {dense_mean[0]:.3f}" + ("" if dense_mean[1] is None else f" ± {dense_mean[1]:.3f}")
            headlines.append(Headline(which, f"{final_mean[0]:.3f}", note, final_mean[1]))
    if contents.stages:
        seconds = sum(stage["seconds"] for stage in contents.stages.values())
        peak = max(stage["peak_memory_mib"] for stage in contents.stages.values())
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
    """The shares of the importance terms in the metric that was found."""
    weights = contents.outcome.best.point.weights if contents.outcome else {}
    total = sum(weights.values())
    return {name: weight / total for name, weight in sorted(weights.items(), key=lambda item: -item[1]) if weight}


def _sizes(contents: Contents) -> list[tuple[str, int, float]]:
    """Title, parameters and bytes of the weights; those of the dense model in the dtype of the saved one."""
    saved = contents.weight_bytes.get(contents.final)
    before, after = _parameters(contents, "dense"), _parameters(contents, contents.final)
    if not saved or not before or not after:
        return []
    return [("dense", before, before * saved / after), (TITLES[contents.final], after, saved)]
