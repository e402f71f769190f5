"""Parameters that several verbs share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter, Token
from pydantic import BaseModel, create_model

from adapruner import config

Flag = Annotated[bool, Parameter(negative="")]
Output = Annotated[Path, Parameter(name=["--output", "-o"])]
Model = Annotated[str, Parameter(help="Hub id, model folder, .gguf file, or smollm2.")]
Device = Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[config.Dtype, Parameter(help="Dtype of the weights; auto keeps the dtype of the checkpoint.")]
Json = Annotated[bool, Parameter(negative="", help="Print JSON on stdout instead of tables.")]
Names = Annotated[tuple[str, ...], Parameter(negative="")]

# Groups of the fields of `PruneOptions` in the command line and the documentation; most runs set the first group only.
OPTION_GROUPS: dict[str, tuple[str, ...]] = {
    "Most used": (
        *("ratio", "calibration", "heal", "evaluate", "effort", "for_", "layout", "remove_attention", "device"),
    ),
    "A size instead of a ratio": tuple(config.SizeLimit.model_fields),
    "What is removed": (
        *("ratio_of", "protect_first", "protect_last", "head_share", "head_granularity"),
        *("expert_granularity", "round_to"),
    ),
    "Datasets": ("seq_len", "sources"),
    "Search": ("trials", "search", "space", "seed"),
    "Read by a search alone": config.OF_A_SEARCH,
    "Compensation": ("compensation", "compensation_windows"),
    "Evaluation": ("evaluate_windows", "evaluate_bos", "tasks", "task_limit"),
    "Model and memory": ("dtype", "layer_wise", "ignore_memory", "architectures", "plugins"),
}
# For comparisons: the help names them in a sentence, and the page of options lists them.
HIDDEN_GROUPS = ("Read by a search alone",)
# The panels of the help of `prune`, in this order.
_GROUPS = {name: Group(name, sort_key=number) for number, name in enumerate(OPTION_GROUPS)}
MOST_USED = next(iter(_GROUPS.values()))
RUN_FOLDER = Group("Run folder", sort_key=len(_GROUPS))

if TYPE_CHECKING:
    PruneOptions = config.PruneOptions
    SizeLimit = config.SizeLimit
else:
    _group_of = {field: name for name, fields in OPTION_GROUPS.items() for field in fields}
    _names = "|".join(name for name in config.PruneOptions.model_fields if "_" in name.strip("_"))

    def _help(description: str | None) -> str:
        """The help of a field, with the options of the command line instead of the names of fields."""
        return re.sub(rf"\b(?:{_names})\b", lambda name: f"--{name[0].replace('_', '-')}", description or "")

    def _for_command_line(options: type[BaseModel]) -> type[BaseModel]:
        """The same fields, each with its panel and its help."""
        fields = {}
        for name, field in options.model_fields.items():
            group, shown = _GROUPS[_group_of[name]], _group_of[name] not in HIDDEN_GROUPS
            parameter = Parameter(group=group, show=shown, help=_help(field.description), negative_iterable=())
            fields[name] = (Annotated[field.annotation, parameter], field)
        return create_model(options.__name__, __base__=options, **fields)

    PruneOptions = _for_command_line(config.PruneOptions)
    PruneOptions._conflicts = ()  # they are found with the options of the recipe
    SizeLimit = _for_command_line(config.SizeLimit)


def given(options: BaseModel | None) -> dict[str, Any]:
    """The options that the command line sets, as keyword arguments."""
    return options.model_dump(exclude_unset=True) if options else {}


def _whole_number(_: Any, tokens: Sequence[Token]) -> int:
    """cyclopts would truncate a fraction."""
    if not re.fullmatch("[0-9]{1,9}", tokens[0].value):
        raise ValueError("expected a whole number from 0 to 999,999,999")
    return int(tokens[0].value)


WholeNumber = Annotated[int, Parameter(converter=_whole_number)]
