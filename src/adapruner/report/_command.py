"""The command of a run, from its config, and commands that may follow it."""

from __future__ import annotations

import shlex
from pathlib import Path

from pydantic import BaseModel

from adapruner.config import PruneConfig, PruneOptions
from adapruner.result import PruneResult

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


def next_commands(run: PruneResult, has_speed: bool) -> dict[str, str]:
    """Command lines to continue with a finished run, by their purpose.

    Args:
        has_speed: the speed of its model was measured.
    """
    config, folder, model = run.result.config, run.output, run.model_folder
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
