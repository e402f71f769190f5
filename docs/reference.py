"""Writes the reference pages from the code: `python docs/reference.py` writes options.md, cli.md and python.md in
docs/reference, as they are read on GitHub and on the site."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from adapruner.cli import app
from adapruner.cli.shared import OPTION_GROUPS, PruneOptions, SizeLimit
from adapruner.options import RecoveryOptions

FOLDER = Path(__file__).parent / "reference"

_OPTIONS = """# Options

<!-- Written by docs/reference.py. -->

The command line, recipes and Python have the same options. In recipes and in Python, names have underscores:
`--seq-len` is `seq_len`. Options that contradict each other are refused before any work, and the message says what to
do.

## Pruning

Of `adapruner prune`, and but for those of a size of `adapruner inspect --cost`: the fields of `PruneOptions` and
`SizeLimit`.

"""
_TRAINING = """
## Training

Of `adapruner recover`: the fields of `RecoveryOptions`.

"""
_CLI = """# Command line

<!-- Written by docs/reference.py. -->

Every command has `--help`, with examples. Results go to stdout, progress and messages to stderr. With `--json`, stdout
is JSON alone. On a terminal there are progress bars, in a log one line for every stage, and one a minute while it
lasts. Lines that begin with `adapruner:` are errors, lines that begin with `advice:` are not.

- `--quiet` prints only results, errors and advice. `-v` adds the memory and time of every stage, and the warnings of
  transformers and the Hub.
- `NO_COLOR=1` switches colours off.
- `adapruner --install-completion` sets up the completion of bash, zsh or fish.
- [Exit codes](runs.md#exit-codes): 0 success, 2 invalid input or insufficient resources, 129, 130 and 143 interrupted,
  141 stdout was closed, 1 unexpected error.
"""
_SHARED = {
    "prune": "[All pruning options](options.md#pruning). In addition:",
    "inspect": "With `--cost`, [all pruning options](options.md#pruning); without it, `--architectures` alone."
    " In addition:",
    "recover": "[All training options](options.md#training). In addition:",
}
_PYTHON = """# Python

<!-- Written by docs/reference.py. -->

`import adapruner` has every function of the command line. Single parts are imported from the packages below it.
[Library](../guides/library.md) has examples.
"""
_NAMES = {
    "The commands": """
        prune load load_tokenizer recover vocabulary evaluate benchmark export inspect
        run.prune.estimate""",
    "Arguments and results": """
        TriedPoint StageCost PruneResult RunResult PruningPlan PruneConfig PrunedVocabulary Evaluation
        Perplexity TaskScore Speed AdaPrunerError""",
    "The steps, one by one": "make_windows measure score cut compensate",
    "The parts": """
        build_structure Structure Block Statistics MetricPoint Term register_term score_groups Budget Profile
        kept_counts make_plan Architecture register_architectures parse_source read_documents register_sources""",
}


def pages() -> dict[str, str]:
    """The content of every page, by its name."""
    return {"options.md": options_page(), "cli.md": cli_page(), "python.md": python_page()}


def options_page() -> str:
    """A table of the options of each group."""
    fields = PruneOptions.model_fields | SizeLimit.model_fields
    groups = {name: {field: fields[field] for field in names} for name, names in OPTION_GROUPS.items()}
    tables = [f"### {name}\n\n{_table(group)}\n" for name, group in groups.items()]
    return _OPTIONS + "\n".join(tables) + _TRAINING + _table(RecoveryOptions.model_fields) + "\n"


def _table(fields: dict[str, FieldInfo]) -> str:
    rows = ["| option | values | default | |", "|---|---|---|---|"]
    for name, field in fields.items():
        values = " ".join(filter(None, [_values(field.annotation), *map(_limit, field.metadata)]))
        help_text = next((part.help for part in field.metadata if getattr(part, "help", None)), field.description)
        rows.append(f"| `{_option(name)}` | {values} | {_default(field.default)} | {_cell(help_text)} |")
    return "\n".join(rows)


def _option(name: str) -> str:
    return f"--{name.strip('_').replace('_', '-')}"


def _default(default: Any) -> str:
    values = default if isinstance(default, tuple) else (default,)
    is_empty = (None, PydanticUndefined, inspect.Parameter.empty, False)
    return ", ".join(f"`{value}`" for value in values if not any(value is empty for empty in is_empty))


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _values(annotation: Any) -> str:
    """The values that an option takes."""
    arguments = [argument for argument in typing.get_args(annotation) if argument not in (type(None), Ellipsis)]
    if typing.get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return ", ".join(map(_values, arguments))
    if typing.get_origin(annotation) is Annotated:
        return _values(arguments[0])
    if typing.get_origin(annotation) is tuple:
        return f"{_values(arguments[0])}, repeated"
    return {bool: "on; off as `--no-…`", int: "whole number", float: "number", Path: "path"}.get(annotation, "text")


def _limit(bound: Any) -> str:
    signs = {"ge": "≥", "gt": "&gt;", "le": "≤", "lt": "&lt;"}
    return " ".join(f"{sign} {getattr(bound, name):g}" for name, sign in signs.items() if hasattr(bound, name))


def cli_page() -> str:
    """A section for each command: what it does, examples, and the options that the page of options does not have."""
    return _CLI + "".join(
        f"\n## {name}\n\n{_description(command)}\n\n{_SHARED.get(name, '')}\n\n{_parameters(name, command)}\n".replace(
            "\n\n\n\n", "\n\n"
        )
        for name, command in _commands(app)
    )


def _commands(parent: App, prefix: str = "") -> Iterator[tuple[str, App]]:
    for name in parent:
        if not name.startswith("-"):
            yield prefix + name, parent[name]
            yield from _commands(parent[name], f"{prefix}{name} ")


def _description(command: App) -> str:
    assert command.default_command
    return (inspect.getdoc(command.default_command) or "").partition("\n\nArgs:")[0]


def _parameters(name: str, command: App) -> str:
    rows = ["| argument or option | default | |", "|---|---|---|"]
    listed = PruneOptions.model_fields if name in ("prune", "inspect") else {}
    listed = listed | SizeLimit.model_fields if name == "prune" else listed
    listed = RecoveryOptions.model_fields if name == "recover" else listed
    for argument in command.assemble_argument_collection(parse_docstring=True):
        names = [option for option in argument.names if not option.startswith("--no-")]
        if argument.name == "*" or any(names[0] == _option(field) for field in listed):
            continue
        default = "required" if argument.required else _default(argument.field_info.default)
        rows.append(
            f"| {', '.join(f'`{option}`' for option in names)} | {default} | {_cell(argument.parameter.help)} |"
        )
    return "\n".join(rows)


def python_page() -> str:
    """A section for each function and class: its signature and its docstring."""
    sections = (
        f"\n## {title}\n\n" + "\n".join(_entry(f"adapruner.{name}") for name in names.split())
        for title, names in _NAMES.items()
    )
    return _PYTHON + "".join(sections)


def _entry(path: str) -> str:
    module, _, name = path.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    text = [_signature(name, thing), "", inspect.getdoc(thing) or ""]
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        for method, value in vars(thing).items():
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
                text += [
                    "",
                    _signature(f".{method}", function),
                    f"    {inspect.getdoc(function)}".replace("\n", "\n    "),
                ]
    return f"### {path}\n\n```text\n" + "\n".join(line.rstrip() for line in "\n".join(text).splitlines()) + "\n```\n"


def _signature(name: str, thing: Any) -> str:
    if inspect.isclass(thing) and issubclass(thing, BaseModel | Exception):
        return f"class {name}"
    written = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    if isinstance(written, ast.ClassDef):
        fields = [line for line in written.body if isinstance(line, ast.AnnAssign)]
        parameters = [ast.unparse(line) for line in fields if not ast.unparse(line.target).startswith("_")]
    else:
        assert isinstance(written, ast.FunctionDef)
        parameters = _parameters_of(written.args)
    line = f"{name}({', '.join(parameters)})"
    return line if len(line) <= 110 else f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + ")"


def _parameters_of(arguments: ast.arguments) -> list[str]:
    """The parameters of a function as they are written."""

    def shown(argument: ast.arg, default: ast.expr | None = None) -> str:
        annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
        return f"{argument.arg}{annotation}{f' = {ast.unparse(default)}' if default else ''}"

    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    parameters = [shown(*pair) for pair in zip(positional, defaults, strict=True)]
    if arguments.kwonlyargs:
        parameters += ["*", *(shown(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))]
    return [*parameters, f"**{shown(arguments.kwarg)}"] if arguments.kwarg else parameters


if __name__ == "__main__":
    for page, content in pages().items():
        (FOLDER / page).write_text(content, encoding="utf-8")
