"""Parameters that several commands share, and results on stdout and advice on stderr."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter, Token
from pydantic import BaseModel, create_model
from pydantic_core import to_jsonable_python
from rich.console import RenderableType

from adapruner import options as config
from adapruner.base.progress import PlainConsole

if TYPE_CHECKING:
    from adapruner.run.memory import Memory

Flag = Annotated[bool, Parameter(negative="")]
Output = Annotated[Path, Parameter(name=["--output", "-o"])]
Model = Annotated[str, Parameter(help="Hub id, model folder, .gguf file, or smollm2.")]
Device = Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[config.Dtype, Parameter(help=config.PruneOptions.model_fields["dtype"].description)]
Json = Annotated[bool, Parameter(negative="", help="Print JSON on stdout instead of tables.")]
Names = Annotated[tuple[str, ...], Parameter(negative="")]

# Groups of the fields of `PruneOptions` in the command line and the documentation; most runs set the first group only.
OPTION_GROUPS: dict[str, tuple[str, ...]] = {
    "Most used": ("ratio", "size", "memory", "calibration", "effort", "for_", "vocabulary", "heal"),
    "Cache in that memory": ("context", "batch"),
    "What is removed": (
        "vocabulary_size",
        *("layout", "remove_attention"),
        *("ratio_of", "protect_first", "protect_last", "head_share", "head_granularity"),
        *("expert_granularity", "round_to", "tensor_parallel"),
    ),
    "Datasets": ("seq_len", "sources"),
    "Search": ("trials", "search", "space", "seed"),
    "Read by a search alone": config.OF_A_SEARCH,
    "Compensation": ("compensation", "compensation_windows"),
    "Evaluation": ("evaluate", "evaluate_bos", "tasks", "limit"),
    "Model and memory": ("device", "dtype", "layer_wise", "ignore_memory", "architectures", "plugins"),
}
# Of `recover`, what most runs set.
_MOST_USED_IN_TRAINING = ("train", "tokens", "learning_rate", "seq_len", "micro_batch_size")
# A word of the command line that is read before it: what a help shows is fixed when the verbs are defined.
HELP_ALL = "--help-all"
SHOWS_ALL = HELP_ALL in sys.argv
# The panels of the help of `prune`, in this order.
_GROUPS = {name: Group(name, sort_key=number) for number, name in enumerate(OPTION_GROUPS)}
MOST_USED = next(iter(_GROUPS.values()))
_TRAINING, RUN_FOLDER = Group("Training", sort_key=0), Group("Run folder", sort_key=len(_GROUPS))
ShownInAll = Parameter(show=SHOWS_ALL)

if TYPE_CHECKING:
    PruneOptions = config.PruneOptions
    SizeLimit = config.SizeLimit
    RecoveryOptions = config.RecoveryOptions
else:
    _group_of = {field: name for name, fields in OPTION_GROUPS.items() for field in fields}
    _names = "|".join(name for name in config.PruneOptions.model_fields if "_" in name)

    def _help(description: str | None) -> str:
        """The help of a field, with the options of the command line instead of the names of fields."""
        return re.sub(rf"\b(?:{_names})\b", lambda name: f"--{name[0].strip('_').replace('_', '-')}", description or "")

    def _for_command_line(options: type[BaseModel]) -> type[BaseModel]:
        """The same fields, each with its panel and its help."""
        fields = {}
        for name, field in options.model_fields.items():
            is_training = options is config.RecoveryOptions
            group = _TRAINING if is_training else _GROUPS[_group_of[name]]
            shown = SHOWS_ALL or (name in _MOST_USED_IN_TRAINING if is_training else group is MOST_USED)
            text, has_default = _help(field.description), field.default != ()
            parameter = Parameter(group=group, show=shown, help=text, show_default=has_default, negative_iterable=())
            fields[name] = (Annotated[field.annotation, parameter], field)
        return create_model(options.__name__, __base__=options, **fields)

    PruneOptions = _for_command_line(config.PruneOptions)
    PruneOptions._conflicts = lambda _: ()  # they are found with the options of the recipe
    SizeLimit = _for_command_line(config.SizeLimit)
    RecoveryOptions = _for_command_line(config.RecoveryOptions)


def given(options: BaseModel | None) -> dict[str, Any]:
    """The options that the command line sets, as keyword arguments."""
    return options.model_dump(exclude_unset=True) if options else {}


def _whole_number(_: object, tokens: Sequence[Token]) -> int:
    """cyclopts would truncate a fraction."""
    if not re.fullmatch("[0-9]{1,9}", tokens[0].value):
        raise ValueError("expected a whole number from 0 to 999,999,999")
    return int(tokens[0].value)


WholeNumber = Annotated[int, Parameter(converter=_whole_number)]


GIB = 2**30

# What a shell reports of a process that SIGPIPE ended.
CLOSED_OUTPUT = 141


class _Console(PlainConsole):
    def on_broken_pipe(self) -> None:
        """Ends as other tools do if the reader of stdout has ended; rich drops the output, but exits with code 1.
        Output on stderr that nobody reads is dropped, and the command continues."""
        if self.stderr:
            return
        try:
            super().on_broken_pipe()
        finally:
            sys.exit(CLOSED_OUTPUT)


def plain_console(stderr: bool = False) -> PlainConsole:
    """A console on stdout or stderr."""
    return _Console(stderr=stderr)


def print_output(content: object, json: bool, shown: Iterable[RenderableType]) -> None:
    """Prints the result of a verb on stdout.

    Args:
        content: the result: models of pydantic, dataclasses, and lists and dicts of them.
        json: print the content as indented JSON, and nothing else.
        shown: printed otherwise: tables, and lines that are not wrapped.
    """
    console = plain_console()
    for line in [dumps(_finite(to_jsonable_python(content)), indent=2)] if json else shown:
        console.print(line, soft_wrap=isinstance(line, str))


def _finite(content: object) -> object:
    """The content without infinities and NaN, which JSON does not have: such a field is null, and `NAME_missing` beside
    it says why."""
    if isinstance(content, list):
        return [*map(_finite, content)]
    if not isinstance(content, dict):
        return content
    finite = {}
    for name, value in content.items():
        finite[name] = _finite(value)
        if isinstance(value, float) and not math.isfinite(value):
            finite[name] = None
            finite[f"{name}_missing"] = "not a number" if math.isnan(value) else "too large for a number"
    return finite


def where(device: str, layer_wise: bool) -> str:
    """Which layers are in memory at a time, and what a run leaves out for that."""
    if layer_wise:
        return "one layer at a time in memory, which leaves out the text that the original writes for the verdict"
    if count := device.count(","):
        return f"all layers in memory, spread over {count + 1} devices, where healing trains scales alone"
    return "all layers in memory"


def memory_line(memory: Memory, device: str) -> str:
    """The memory of a run on the device of the model, on each if there are several, and in main memory."""
    place = f"each of {device}" if "," in device else device
    host = f", and {memory.host / GIB:.3g} GiB of main memory" if memory.host else ""
    return f"memory: {memory.arithmetic} on {place}{host}"


def print_advice(lines: list[str]) -> None:
    """Prints advice on stderr."""
    from adapruner.cli import with_options

    for line in lines:
        plain_console(stderr=True).print(f"advice: {with_options(line)}", style="yellow", soft_wrap=True)


def print_note(line: str) -> None:
    """Prints a line about the progress on stderr."""
    if _shows_progress():
        plain_console(stderr=True).print(line, soft_wrap=True)


def _shows_progress() -> bool:
    """True unless --quiet is set; of processes that torchrun started together, for the first alone."""
    return logging.getLogger("adapruner").isEnabledFor(logging.INFO) and os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Shows on a terminal that libraries are being imported, which takes seconds."""
    console = plain_console(stderr=True)
    console.quiet = not _shows_progress()
    # Imports make hundreds of thousands of objects and no garbage: looking for some takes a fifth of the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        with console.status("starting"):
            yield
    finally:
        if collects:
            gc.enable()
