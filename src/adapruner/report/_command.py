"""The command of a run, from its config, and commands that may follow it."""

from __future__ import annotations

import shlex
from itertools import chain
from pathlib import Path

from pydantic import BaseModel

from adapruner.calibration import SELF_GENERATED, parse_source
from adapruner.config import TARGET_OPTIONS, PruneConfig, PruneOptions
from adapruner.report._contents import Contents

# The folder of the search, if a run took its point from another run.
_SEARCHED = "runs/searched"


def command(config: PruneConfig, output: Path) -> str:
    """The command line, one option a line, with the options that differ from their defaults; two commands if the run
    took the best point of a search at another ratio.

    Args:
        config: the options, with one ratio.
    """
    (ratio,) = config.ratio
    if config.searched is not None:
        amounts = PruneOptions().model_dump(include={"ratio", *TARGET_OPTIONS}) | config.searched
        searched = PruneConfig(**config.model_dump() | amounts | {"searched": None})
        target = PruneOptions(**{name: getattr(config, name) for name in TARGET_OPTIONS})
        amount = _options(target) if config.target else [("--ratio", str(ratio))]
        again = shlex.join(("adapruner", "plan", _SEARCHED, *chain.from_iterable(amount), "-o", str(output)))
        return f"{command(searched, Path(_SEARCHED))}\n{again}"
    options = _options(PruneOptions(**config.model_dump(exclude={"model", "searched"})))
    return " \\\n    ".join(map(shlex.join, [("adapruner", "prune", config.model, "-o", str(output)), *options]))


def next_commands(contents: Contents) -> dict[str, str]:
    """Command lines to continue with a finished run, by their purpose."""
    config, folder, model = contents.config, contents.path, contents.final_folder
    commands: dict[str, tuple[str, ...]] = {}
    if not config.recover and _can_be_learnt(config):
        commands["Recover part of the loss by fine-tuning"] = (
            *("recover", str(model), "--data", config.calibration, "--teacher", config.model),
            *("-o", str(folder / "better")),
        )
    if not config.tasks:
        commands["Measure tasks"] = ("evaluate", str(model), "--tasks", "commonsense")
    if not contents.speed:
        commands["Measure the speed on this machine, and show it here"] = (
            *("benchmark", str(model), "--against", config.model, "-o", str(folder / "speed.json")),
        )
    commands["Export for llama.cpp"] = ("export", str(model), "--to", "gguf", "-o", str(folder / "model.gguf"))
    return {purpose: shlex.join(("adapruner", *words)) for purpose, words in commands.items()}


def _can_be_learnt(config: PruneConfig) -> bool:
    """True if fine-tuning can read the dataset of the calibration: text, under a name that needs no file of sources; or
    text that the dense model writes."""
    if config.calibration == SELF_GENERATED:
        return True
    return not config.sources and not parse_source(config.calibration, missing_ok=True).holds_windows


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
