"""Additions to the site: tables of options from the classes that hold them, and the pages of `research/`."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from adapruner import config
from adapruner.cli._options import OPTION_GROUPS

_DIRECTIVE = re.compile(r"^::: options (\w+)(?: prefix=(\S+))?$", re.MULTILINE)

# On GitHub, links lead out of `docs/` to `research/`; in the site, `research/` is inside.
_LINK_TO_RESEARCH = re.compile(r"\]\(\.\./(?=(?:\.\./)*research/)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of `research/`."""
    root = Path(config.docs_dir).parent
    for page in sorted((root / "research").rglob("*.md")):
        files.append(File.generated(config, page.relative_to(root).as_posix(), abs_src_path=str(page)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces every line `::: options CLASS [prefix=…]` by a table of the options of that class, and leads links to
    `research/` to its pages in the site."""
    markdown = _LINK_TO_RESEARCH.sub("](", markdown)
    return _DIRECTIVE.sub(lambda match: options_tables(getattr(config, match[1]), match[2] or ""), markdown)


def options_tables(options: type[BaseModel], prefix: str = "") -> str:
    """Markdown tables of the fields of a class: option, values, default, help. Of `PruneOptions`, one for each group.

    Args:
        prefix: what stands before the name of an option on the command line.
    """
    fields = options.model_fields
    if options is not config.PruneOptions:
        return _table(fields, prefix)
    groups = {name: {field: fields[field] for field in names} for name, names in OPTION_GROUPS.items()}
    return "\n\n".join(f"### {name}\n\n{_table(own, prefix)}" for name, own in groups.items() if "recovery" not in own)


def _table(fields: dict[str, FieldInfo], prefix: str) -> str:
    rows = ["| option | values | default | |", "|---|---|---|---|"]
    for name, field in fields.items():
        defaults = field.default if isinstance(field.default, tuple) else (field.default,)
        default = ", ".join(f"`{one}`" for one in defaults if one not in (None, PydanticUndefined))
        values = " ".join([_values(field.annotation), *map(_limit, field.metadata)])
        rows.append(f"| `--{prefix}{name.strip('_').replace('_', '-')}` | {values} | {default} | {field.description} |")
    return "\n".join(rows)


def _values(annotation: Any) -> str:
    """What may stand behind an option."""
    arguments = [argument for argument in typing.get_args(annotation) if argument not in (type(None), Ellipsis)]
    if typing.get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, Annotated):
        return _values(arguments[0])
    if typing.get_origin(annotation) is tuple:
        return f"{_values(arguments[0])}, repeated"
    return {bool: "on; off as `--no-…`", int: "whole number", float: "number", str: "text"}[annotation]


def _limit(bound: Any) -> str:
    signs = {"ge": "≥", "gt": "&gt;", "le": "≤", "lt": "&lt;"}
    return " ".join(f"{sign} {getattr(bound, name):g}" for name, sign in signs.items() if hasattr(bound, name))
