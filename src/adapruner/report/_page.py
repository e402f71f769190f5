"""The page of a finished run, as self-contained HTML."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors import SafetensorError

from adapruner.errors import AdaPrunerError, reason
from adapruner.files import being_written
from adapruner.graph.folder import RunFolder
from adapruner.planning._plan import PruningPlan
from adapruner.report import _charts, _tables
from adapruner.report._command import command, next_commands
from adapruner.report._contents import read_result, read_samples, read_speed
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
_TEMPLATES.filters |= {"described": _charts.described, "duration": _charts.duration, "show_layers": show_layers}


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
    """The page of a finished run, as text.

    Raises:
        AdaPrunerError: something in the folder cannot be read.
    """
    config, search, dense, final = result.config, result.search, result.model("dense"), result.final
    try:
        finished = PruneResult(run.path, PruningPlan.load(run.path / "plan.json"), result)
        samples, speed = read_samples(run, search.best.samples) if search else {}, read_speed(run, result)
        weight_bytes = sum(file.stat().st_size for file in finished.model_folder.glob("*.safetensors"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise AdaPrunerError(f"cannot read the run in {run.path}: {reason(error)}") from error
    names = titles(result)
    used: dict[str, list[str]] = defaultdict(list)
    for use, text in assign_texts(config).used if final.perplexity else ():
        used[use].append(str(text))
    page = _TEMPLATES.get_template("report.html.jinja").render(
        policy=_POLICY,
        folder=run.path,
        config=config,
        plan=finished.plan,
        result=result,
        search=search,
        dense=dense,
        final=final,
        name=shown_name(config.model),
        losses=_tables.losses(dense, final, names[final.role]),
        gains=_tables.gains(dense, final, names[final.role], weight_bytes, speed),
        speed=speed,
        samples=samples,
        mean=next((number for number in final.numbers.values() if number.kind == "mean"), None),
        used={use: ", ".join(texts) for use, texts in used.items()},
        advice=finished.advice(),
        next_commands=next_commands(finished, speed is not None),
        model_tables=tables_of("Numbers of every model", result.models, names),
        texts=_tables.texts({names[model.role]: model for model in result.models}),
        trials=_charts.trials(search) if search else None,
        strips=_charts.strips(search) if search else None,
        chosen=next(point for point in search.points if point.number == search.best_trial) if search else None,
        ladder=_tables.ladder(result),
        costs=_tables.costs(result, finished.plan),
        command=command(config, run.path),
        options=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    )
    return printable(page)
