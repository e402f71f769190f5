"""The command that makes a run, from its config."""

from __future__ import annotations

import shlex
from pathlib import Path

from pydantic import BaseModel

from adapruner.config import PruneConfig, PruneOptions

# The folder of the search, where a run took its point from another.
_SEARCHED = "runs/searched"


def command(config: PruneConfig, output: Path, storage: str | None = None, searched_ratio: float | None = None) -> str:
    """The command line, one option a line, with those options alone that differ from their defaults; two commands
    where the point was searched at another ratio.

    Args:
        storage: the database that keeps the trials.
        searched_ratio: the ratio of the search, as far as there was one.
    """
    if searched_ratio not in (None, config.ratio[0]):
        searched = command(config.model_copy(update={"ratio": (searched_ratio,)}), Path(_SEARCHED), storage)
        again = shlex.join(("adapruner", "plan", _SEARCHED, "--ratio", str(config.ratio[0]), "-o", str(output)))
        return f"{searched}\n{again}"
    options = _options(PruneOptions(**config.model_dump(exclude={"model", "search_ratio"})))
    if storage:
        options.append(("--storage", storage))
    return " \\\n    ".join(map(shlex.join, [("adapruner", "prune", config.model, "-o", str(output)), *options]))


def _options(values: BaseModel, prefix: str = "--") -> list[tuple[str, ...]]:
    options: list[tuple[str, ...]] = []
    for field, definition in type(values).model_fields.items():
        value = getattr(values, field)
        name = prefix + field.replace("_", "-")
        if value == definition.default:
            continue
        if isinstance(value, BaseModel):
            options += _options(value, f"{name}.")
        elif isinstance(value, bool):
            options.append((name if value else f"{prefix}no-{field.replace('_', '-')}",))
        else:
            options += [(name, str(one)) for one in (value if isinstance(value, tuple) else (value,))]
    return options
