"""The page: what there is of a run, as self-contained HTML."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from adapruner.config import PruneConfig
from adapruner.evaluation import AGREEMENT_PROTOCOL, REPETITION_PROTOCOL
from adapruner.files import being_written
from adapruner.report import _figures
from adapruner.report._command import command
from adapruner.report._contents import Contents, read_contents
from adapruner.report._figures import LOSS_NAMES, described, perplexity_error, shortened
from adapruner.result import ModelNumbers, bits, fraction, plus_minus, shown_name, titles
from adapruner.run import RunFolder

_TEMPLATES = Environment(
    loader=PackageLoader("adapruner.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"described": described, "perplexity_error": perplexity_error, "shortened": shortened}
_TEMPLATES.filters |= {"bits": bits, "fraction": fraction}


@dataclass(frozen=True)
class Headline:
    """One of the numbers at the top of the page."""

    label: str
    value: str
    note: str
    error: float | None = None


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
    contents = read_contents(run, config)
    chosen = contents.levelled.candidate if contents.levelled else contents.search and contents.search.best
    return render(
        "report.html.jinja",
        _all_figures(contents),
        contents=contents,
        refresh=refresh if contents.state == "running" else None,
        titles=titles(config, contents.search.best_fixed_name if contents.search else None),
        name=shown_name(config.model),
        headlines=_headlines(contents),
        means={model.role: _means(model) for model in contents.models},
        agreement_protocol=AGREEMENT_PROTOCOL,
        repetition_protocol=REPETITION_PROTOCOL,
        loss_name="objective" if config.objective_function else LOSS_NAMES[config.selection],
        allocation=asdict(chosen.budget) if chosen else {},
        command=command(contents.config, contents.path),
        options=yaml.safe_dump(contents.config.model_dump(mode="json"), sort_keys=False),
    )


def render(template: str, figures: Mapping[str, go.Figure], **values: Any) -> str:
    """A page with charts, as text.

    Args:
        figures: by the name that the template draws them under.
        values: what else the template shows.
    """
    scripts = [get_plotlyjs(), _TEMPLATES.get_template("report.js").render()]
    return _TEMPLATES.get_template(template).render(
        # Whatever a text may smuggle in: nothing is run but these scripts, and nothing is fetched.
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "
        + " ".join(map(_script_hash, scripts)),
        scripts=[Markup(script) for script in scripts],
        figures={name: json.loads(figure.to_json()) for name, figure in figures.items()},
        **values,
    )


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
            if number.bits_per_byte is not None and contents.config.vocabulary:
                before_bits = bits(contents.dense.perplexity[text])
                headlines.append(Headline(f"bits per byte, {shortened(text)}", bits(number), f"dense {before_bits}"))
                continue
            headlines.append(
                Headline(f"perplexity, {shortened(text)}", f"{final:.2f}", f"dense {dense:.2f}, × {final / dense:.2f}")
            )
        for metric, (mean, error) in list(_means(contents.final).items())[:1]:
            of_dense, error_of_dense = _means(contents.dense)[metric]
            count = len(contents.final.tasks)
            which = f"mean {metric} of {count} tasks" if count > 1 else metric
            note = f"dense {of_dense:.3f}{plus_minus(error_of_dense, 3)}"
            headlines.append(Headline(which, f"{mean:.3f}", note, error))
        if contents.final.breakage and contents.final.verdict:
            agreement = contents.final.breakage.agreement
            note = "" if agreement is None else f"agrees with {agreement:.0%} of the dense model's text"
            headlines.append(Headline("verdict", contents.final.verdict, note))
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
