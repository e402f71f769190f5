"""The page of a finished run, as self-contained HTML, with the command of the run and those that may follow."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel

from adapruner.base.terminal import printable
from adapruner.budget.plan import PruningPlan
from adapruner.evaluation.speed import Speed
from adapruner.options import PruneConfig, PruneOptions
from adapruner.report import figures
from adapruner.report.result import RunResult, advice_on, shown_name, tables_of, titles
from adapruner.structure.blocks import show_layers
from adapruner.text.uses import assign_texts

# The folder of the search, if a run took it from another run.
_SEARCHED = "runs/searched"


def command(config: PruneConfig, output: Path) -> str:
    """The command line, one option a line, with the options that differ from their defaults; two commands if the run
    took the search of another one, at another ratio."""
    if config.searched is not None:
        searched = config.model_copy(update={"ratio": config.searched, "searched": None})
        again = ("adapruner", "prune", "--from", _SEARCHED, "--ratio", str(config.ratio), "-o", str(output))
        return f"{command(searched, Path(_SEARCHED))}\n{shlex.join(again)}"
    options = _options(PruneOptions(**config.model_dump(exclude={"model", "searched"})))
    return " \\\n    ".join(map(shlex.join, [("adapruner", "prune", config.model, "-o", str(output)), *options]))


def next_commands(result: RunResult, folder: Path, has_speed: bool) -> dict[str, str]:
    """Command lines to continue with a finished run, by their purpose.

    Args:
        has_speed: the speed of its model was measured.
    """
    config, model = result.config, folder / "model"
    commands: dict[str, tuple[str, ...]] = {}
    if not config.sources:  # recover has no files of sources
        commands["Train on, as long again"] = ("recover", str(folder))
    if not config.tasks:
        commands["Measure tasks"] = ("evaluate", str(model), "--tasks", "commonsense")
    if not has_speed:
        commands["Measure the speed on this machine, and show it here"] = (
            *("benchmark", str(model), "--against", config.model, "-o", str(folder / "speed.json")),
        )
    commands["Export for llama.cpp"] = ("export", str(model), "--to", "gguf", "-o", str(folder / "model.gguf"))
    return {purpose: shlex.join(("adapruner", *words)) for purpose, words in commands.items()}


def _options(values: BaseModel, prefix: str = "--") -> list[tuple[str, ...]]:
    options: list[tuple[str, ...]] = []
    for field, definition in type(values).model_fields.items():
        value = getattr(values, field)
        name = prefix + field.strip("_").replace("_", "-")
        if value == definition.default:
            continue
        if isinstance(value, BaseModel):
            options += _options(value, f"{name}.")
        elif isinstance(value, bool):
            options.append((name if value else f"{prefix}no-{field.replace('_', '-')}",))
        else:
            options += [(name, str(entry)) for entry in (value if isinstance(value, tuple) else (value,))]
    return options


# Whatever a text contains: nothing is run and nothing is fetched.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_TEMPLATES = Environment(
    loader=PackageLoader("adapruner.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"described": figures.described, "duration": figures.duration, "show_layers": show_layers}


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
    names = titles(result)
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
        losses=figures.losses(dense, final, names[final.role]),
        gains=figures.gains(dense, final, names[final.role], weight_bytes, speed),
        speed=speed,
        samples=samples,
        mean=next((number for number in final.numbers.values() if number.kind == "mean"), None),
        used={use: ", ".join(texts) for use, texts in used.items()},
        advice=advice_on(result, plan),
        next_commands=next_commands(result, folder, speed is not None),
        model_tables=tables_of("Numbers of every model", result.models, names),
        texts=figures.texts({names[model.role]: model for model in result.models}),
        trials=figures.trials(search) if search else None,
        strips=figures.strips(search) if search else None,
        chosen=next(point for point in search.points if point.number == search.best_trial) if search else None,
        ladder=figures.ladder(result),
        costs=figures.costs(result, plan),
        command=command(config, folder),
        options=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    )
    return printable(page)
