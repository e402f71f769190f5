"""The page: what there is of a run, as self-contained HTML."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from adapruner.config import PruneConfig
from adapruner.evaluation import AGREEMENT_PROTOCOL, REPETITION_PROTOCOL
from adapruner.files import being_written
from adapruner.graph import RunFolder
from adapruner.report import _charts, _summary
from adapruner.report._command import command, next_commands
from adapruner.report._contents import Contents, read_contents
from adapruner.report._ladder import ladder
from adapruner.report._layers import layer_rows, whole_layers
from adapruner.result import PruneResult, bits, fraction, is_noise, shown_name, titles

# Whatever a text may smuggle in: nothing is run and nothing is fetched.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_TEMPLATES = Environment(
    loader=PackageLoader("adapruner.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "described": _charts.described,
    "shortened": _charts.shortened,
    "bits": bits,
    "fraction": fraction,
}
_TEMPLATES.filters["duration"] = _summary.duration
_TEMPLATES.tests["noise"] = is_noise


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
    search, plan = contents.search, contents.plan
    chosen = contents.levelled.candidate if contents.levelled else search and search.best
    best_trial = search.best_trial if search else None
    loss_name = "objective" if config.objective_function else _charts.LOSS_NAMES[config.selection]
    return render(
        "report.html.jinja",
        contents=contents,
        refresh=refresh if contents.state == "running" else None,
        titles=titles(config, search.best_fixed_name if search else None),
        name=shown_name(config.model),
        losses=_summary.losses(contents),
        gains=_summary.gains(contents),
        facts=_summary.facts(contents),
        advice=_advice(contents),
        next_commands=next_commands(contents) if contents.result else {},
        means={model.role: _summary.mean_accuracies(model) for model in contents.models},
        task_differences=_summary.task_differences(contents),
        agreement_protocol=AGREEMENT_PROTOCOL,
        repetition_protocol=REPETITION_PROTOCOL,
        layer_rows=layer_rows(plan, contents.result.vocabulary if contents.result else None) if plan else [],
        whole_layers=whole_layers(plan) if plan else "",
        ladder=ladder(contents),
        loss_name=loss_name,
        trials=_charts.trials(contents.history, best_trial, loss_name),
        strips=_charts.strips(contents.history, best_trial),
        allocation=asdict(chosen.budget) if chosen else {},
        command=command(config, contents.path),
        options=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    )


def render(template: str, **content: Any) -> str:
    """A page of this package."""
    return _TEMPLATES.get_template(template).render(policy=_POLICY, **content)


def _advice(contents: Contents) -> list[str]:
    if not contents.result or not contents.plan:
        return []
    return PruneResult(contents.path, contents.plan, contents.result).advice()
