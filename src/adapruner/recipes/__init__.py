"""Options in files: the recipes of this package, and YAML files of the user."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from adapruner.base.errors import AdaPrunerError, reason
from adapruner.base.files import given_path, parse_options
from adapruner.options import BUDGETS


def recipes() -> dict[str, str]:
    """The YAML text of every recipe of this package, by name; the comment at its beginning states its purpose."""
    files = {file.name: file for file in resources.files("adapruner.recipes").iterdir()}
    names = sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))
    return {name: files[f"{name}.yaml"].read_text(encoding="utf-8") for name in names}


def override(base: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that override others. A ratio or size replaces the ratio or size of the base."""
    if any(options.get(name) is not None for name in BUDGETS):
        # A KV cache is a part of a memory alone.
        gone = {*BUDGETS, *(() if options.get("memory") else ("context", "batch"))}
        base = {name: value for name, value in base.items() if name not in gone}
    return {**base, **options}


def read_recipe(name: str | Path) -> dict[str, object]:
    """The options in a recipe: one of this package, by name, or a YAML file."""
    known = recipes()
    try:
        if text := known.get(str(name)):
            return parse_options(text)
        if not (path := given_path(name)).is_file():
            raise AdaPrunerError(f"no recipe {str(name)!r}: expected {', '.join(known)}, or a YAML file")
        return parse_options(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdaPrunerError(f"cannot read the recipe {name}: {reason(error)}") from None
