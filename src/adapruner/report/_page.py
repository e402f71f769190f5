"""The page of a run, finished or not, as self-contained HTML."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from adapruner.config import PruneConfig
from adapruner.files import being_written
from adapruner.graph import RunFolder
from adapruner.planning import Budget
from adapruner.report import _charts, _tables
from adapruner.report._command import command, next_commands
from adapruner.report._contents import read_contents
from adapruner.result import PruneResult, shown_name, tables_of, titles
from adapruner.structure import show_layers
from adapruner.terminal import printable
from adapruner.texts import assign_texts

# Whatever a text contains: nothing is run and nothing is fetched.
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
    "duration": _charts.duration,
    "show_layers": show_layers,
}


def write_report(run: RunFolder, refresh: int | None = None) -> Path:
    """Writes `report.html` of a run, finished or not.

    Args:
        refresh: seconds after which the page reloads, while the run is in progress.

    Raises:
        AdaPrunerError: the folder holds no run, or cannot be written.
    """
    page = render_report(run, run.read_config(), refresh)
    # The run itself may be writing the page too.
    with being_written(run.report, ".other") as partial:
        partial.write_text(page, encoding="utf-8")
    return run.report


def render_report(run: RunFolder, config: PruneConfig, refresh: int | None = None) -> str:
    """The page of a run with these options, as text."""
    contents = read_contents(run, config)
    search, dense, final, plan, result = contents.search, contents.dense, contents.final, contents.plan, contents.result
    names = titles(config, search.best_fixed_name if search else None)
    best_trial = search.best_trial if search else None
    candidate = contents.levelled.candidate if contents.levelled else search and search.best
    advice = PruneResult(contents.path, plan, result).advice() if plan and result else []
    return render(
        "report.html.jinja",
        contents=contents,
        refresh=refresh if contents.state == "running" else None,
        name=shown_name(config.model),
        losses=_tables.losses(dense, final, names[final.role]) if dense and final else None,
        gains=_tables.gains(contents, dense, final, names[final.role]) if dense and final else None,
        mean=next((number for number in final.numbers.values() if number.kind == "mean"), None) if final else None,
        used=_used_texts(config) if final and final.perplexity else {},
        advice=advice,
        next_commands=next_commands(contents) if result else {},
        model_tables=tables_of("Numbers of every model", contents.models, names),
        texts=_tables.texts({names[model.role]: model for model in contents.models}),
        trials=_charts.trials(contents.history, best_trial),
        strips=_charts.strips(contents.history, best_trial),
        chosen=next((point for point in contents.history.points if point.number == best_trial), None),
        ladder=_tables.ladder(contents, search) if search else None,
        allocation=_allocation(candidate.budget) if candidate else {},
        command=command(config, contents.path),
        options=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    )


def _allocation(budget: Budget) -> dict[str, Any]:
    """The fields of a budget and of its allocation."""
    fields = asdict(budget)
    allocation = fields.pop("allocation")
    return fields | (allocation if isinstance(allocation, dict) else {"layers": allocation})


def render(template: str, **content: Any) -> str:
    """A page of this package."""
    return printable(_TEMPLATES.get_template(template).render(policy=_POLICY, **content))


def _used_texts(config: PruneConfig) -> dict[str, str]:
    """The texts on which the model depends, by use."""
    used: dict[str, list[str]] = {}
    for use, text in assign_texts(config, missing_ok=True).used:
        used.setdefault(use, []).append(str(text))
    return {use: ", ".join(texts) for use, texts in used.items()}
