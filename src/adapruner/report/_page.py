"""The page of a finished run, as self-contained HTML."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from adapruner.config import PruneConfig
from adapruner.files import being_written
from adapruner.graph.folder import RunFolder
from adapruner.planning._budget import Budget
from adapruner.report import _charts, _tables
from adapruner.report._command import command, next_commands
from adapruner.report._contents import read_contents, read_result
from adapruner.result import PruneResult, RunResult, shown_name, tables_of, titles
from adapruner.structure._blocks import show_layers
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


def write_report(run: RunFolder) -> Path:
    """Writes `report.html` of a finished run.

    Raises:
        AdaPrunerError: the folder holds no finished run, or cannot be written.
    """
    page = render_report(run, read_result(run))
    # The run itself may be writing the page too.
    with being_written(run.report, ".other") as partial:
        partial.write_text(page, encoding="utf-8")
    return run.report


def render_report(run: RunFolder, result: RunResult) -> str:
    """The page of a finished run, as text."""
    contents = read_contents(run, result)
    config, search, final, plan = result.config, result.search, result.final, contents.plan
    names = titles(config, search.best_fixed_name)
    candidate = result.levelled.candidate if result.levelled else search.best
    page = _TEMPLATES.get_template("report.html.jinja").render(
        policy=_POLICY,
        contents=contents,
        config=config,
        result=result,
        search=search,
        final=final,
        name=shown_name(config.model),
        losses=_tables.losses(contents.dense, final, names[final.role]),
        gains=_tables.gains(contents, names[final.role]),
        mean=next((number for number in final.numbers.values() if number.kind == "mean"), None),
        used=_used_texts(config) if final.perplexity else {},
        advice=PruneResult(run.path, plan, result).advice(),
        next_commands=next_commands(contents),
        model_tables=tables_of("Numbers of every model", result.models, names),
        texts=_tables.texts({names[model.role]: model for model in result.models}),
        trials=_charts.trials(search),
        strips=_charts.strips(search),
        chosen=next(point for point in search.points if point.number == search.best_trial),
        ladder=_tables.ladder(result),
        allocation=_allocation(candidate.budget),
        command=command(config, run.path),
        options=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    )
    return printable(page)


def _allocation(budget: Budget) -> dict[str, Any]:
    """The fields of a budget and of its allocation."""
    fields = asdict(budget)
    allocation = fields.pop("allocation")
    return fields | (allocation if isinstance(allocation, dict) else {"layers": allocation})


def _used_texts(config: PruneConfig) -> dict[str, str]:
    """The texts on which the model depends, by use."""
    used: dict[str, list[str]] = {}
    for use, text in assign_texts(config, missing_ok=True).used:
        used.setdefault(use, []).append(str(text))
    return {use: ", ".join(texts) for use, texts in used.items()}
