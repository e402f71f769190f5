"""Names of datasets: known ones, local files and Hub datasets, and the three disjoint parts of each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal, cast, get_args

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in __all__
from pydantic import BaseModel, TypeAdapter
from typing_extensions import TypedDict

from adapruner.base.errors import AdaPrunerError, reason
from adapruner.base.files import find_local_data, given_path, parse_yaml

Part = Literal["all", "calibration", "objective", "report"]
Purpose = Literal["train", "report"]
Lines = Literal["keep", "strip", "paragraphs"]
Installed = Literal["functions", "docs"]

# Text of several kinds that the model writes.
MIX = "mix"
# Before the name of a dataset of instructions: the model answers them.
ANSWERS = "answers:"

# Read of the installed Python; where no text is named, the tokens to keep are counted in both.
FUNCTIONS = "python-code"
CODE_AND_ENGLISH = (FUNCTIONS, "python-docs")

# Windows of tokens instead of text.
_OF_WINDOWS = ".safetensors"
_FILES = (".txt", ".jsonl", ".json", ".parquet", _OF_WINDOWS)
_FORMS = "a .txt, .jsonl, .parquet or .safetensors file, or hf:owner/name[:config][:split][:column]"


class HubData(BaseModel, extra="forbid", frozen=True):
    """Arguments of `datasets.load_dataset`."""

    path: str
    name: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Source:
    """A dataset as the user named it, its place and format, and the part of its documents that is used.

    Attributes:
        name: without the part, for example `wikitext2:train`, `notes.txt` or `hf:owner/name::train:text`.
        dataset: the known name, the name of the file, or the name on the Hub.
        path: the local file or folder; None if the dataset is read from the Hub or the installed Python.
        hub: None for a dataset that is only local.
        named_columns: the columns with the text; empty for the usual columns.
        lines: the documents of a plain text file: lines with or without their ends, or paragraphs between empty lines.
        limit: the largest number of rows that are read.
        installed: what is read of the installed Python; None for all other datasets.
        part: `all`, or one of three disjoint parts, into which documents are put by the hash of their text.
    """

    name: str
    dataset: str
    path: Path | None
    hub: HubData | None = None
    split: str = ""
    named_columns: tuple[str, ...] = ()
    lines: Lines = "paragraphs"
    limit: int | None = None
    installed: Installed | None = None
    part: Part = "all"

    @property
    def identity(self) -> str:
        """The same for all names of one dataset, whatever the column: dataset and split, or the absolute path."""
        if self.hub is not None:
            path = given_path(self.hub.path).resolve() if _is_folder(self.hub.path) else self.hub.path
            return f"hf:{path}:{self.hub.name or ''}:{self.split}"
        if self.installed is not None:
            return self.dataset
        return str(self.path and self.path.resolve())

    @property
    def columns(self) -> str:
        """The columns whose text decides the part of a record; empty for the usual columns."""
        return ",".join(self.named_columns)

    @property
    def holds_windows(self) -> bool:
        """True for a file of windows of tokens instead of text."""
        return self.path is not None and self.path.suffix == _OF_WINDOWS

    def __str__(self) -> str:
        return self.name if self.part == "all" else f"{self.name}@{self.part}"

    def restrict(self, part: Part) -> Source:
        """The same source, restricted to a part unless the user already chose one."""
        return self if self.part != "all" else replace(self, part=part)

    def refuse_missing(self) -> None:
        """Raises AdaPrunerError if a local file is missing."""
        if self.path is not None and not (self.path.is_file() or (self.split and self.path.is_dir())):
            raise AdaPrunerError(f"there is no file {self.path}")


class _Splits(TypedDict):
    train: str
    report: str


class KnownSource(BaseModel, extra="forbid", frozen=True):
    """An entry of sources.yaml, where its fields are explained."""

    hub: HubData | None = None
    installed: Installed | None = None
    split: str | _Splits
    columns: tuple[str, ...]
    local: dict[str, str] = {}
    lines: Lines = "strip"
    limit: int | None = None


def parse_source(text: str, purpose: Purpose = "train", missing_ok: bool = False) -> Source:
    """Reads `DATASET` or `DATASET@PART`. A known source is read from its local copy if there is one; if it has a split
    for each purpose, the name gets that split.

    Args:
        purpose: `train` to calibrate or train on, `report` to report perplexity on.
        missing_ok: accept a local file that is missing.
    """
    name, at, part = text.rpartition("@")
    # A path may contain @ too.
    is_path = given_path(text).is_file() or (text.startswith("hf:") and _is_folder(text[3:].partition(":")[0]))
    if not at or is_path or set(part) & set("/:"):
        name, part = text, "all"
    if part not in get_args(Part):
        raise AdaPrunerError(f"unknown part {part!r} of {name!r}; the parts are {', '.join(get_args(Part)[1:])}")
    source = replace(_named(name, purpose), part=cast(Part, part))
    if not missing_ok:
        source.refuse_missing()
    return source


def _named(name: str, purpose: Purpose) -> Source:
    """The dataset of a name, all parts of it; refuses unknown names."""
    dataset, option = split_name(name)
    if dataset == "hf":
        return _on_hub(name, option)
    if known := known_sources().get(dataset):
        if known.installed and option:
            raise AdaPrunerError(f"{name!r}: {dataset} has no splits and no columns; a share is a number such as 0.5")
        split = option or (known.split if isinstance(known.split, str) else known.split[purpose])
        path = find_local_data(known.local[split]) if split in known.local else None
        if path is None and known.hub is None and known.installed is None:
            path = Path(known.local.get(split, f"{dataset}:{split}"))
        name = name if isinstance(known.split, str) else f"{dataset}:{split}"
        return Source(name, dataset, path, known.hub, split, known.columns, known.lines, known.limit, known.installed)
    path = given_path(dataset)
    if path.suffix in _FILES:
        if option and path.suffix in (".txt", _OF_WINDOWS):
            raise AdaPrunerError(f"{name!r}: {path.name} has no columns; a share is a number such as 0.5")
        return Source(name, path.name, path, named_columns=(option,) if option else ())
    if name == MIX:
        raise AdaPrunerError(f"{name!r} is text that the model writes: it is for calibration and training alone")
    close = difflib.get_close_matches(dataset, known_sources(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise AdaPrunerError(f"unknown text source {name!r}: expected {', '.join(known_sources())}, {MIX}, {_FORMS}.{hint}")


def _on_hub(name: str, option: str) -> Source:
    """The dataset named `hf:OPTION`; a local folder with the layout of a Hub dataset is read in the same way."""
    path, config, split, column, *_ = (*option.split(":"), "", "", "")
    is_folder = _is_folder(path)
    try:
        if option.count(":") > 3:
            raise HFValidationError("it has more than four parts")
        if not is_folder:
            validate_repo_id(path)
    except HFValidationError as error:
        raise AdaPrunerError(f"{name!r} names no dataset, expected {_FORMS}: {reason(error)}") from None
    hub = HubData(path=str(given_path(path)) if is_folder else path, name=config or None)
    return Source(name, hub.path, None, hub, split or "train", (column,) if column else ())


def absolute_source(text: str) -> str:
    """The name of a source with an absolute path, which is valid in any working directory."""
    path, option = split_name(parse_source(text, missing_ok=True).name)
    if path in known_sources():
        return text
    prefix = "hf:" if path == "hf" else ""
    path = option.partition(":")[0] if prefix else path
    if prefix and not _is_folder(path):
        return text
    return f"{prefix}{given_path(path).absolute()}{text[len(prefix + path) :]}"


def source_names(texts: Sequence[str]) -> list[str]:
    """The names of datasets, given one by one or separated by commas; the path of a file may have commas itself."""
    names = []
    for text in texts:
        path, option = split_name(text)
        is_single = given_path(path).is_file() and "," not in option
        names += [text] if is_single else [name.strip() for name in text.split(",")]
    return [name for name in names if name]


def texts_to_count(names: Sequence[str], size: str | None) -> tuple[str, ...]:
    """The names of the datasets in which the tokens to keep are counted.

    Args:
        names: as the user gave them, for `source_names`; none stand for code and English if there is a size.
        size: the number of tokens to keep.
    """
    return tuple(source_names(names)) or (CODE_AND_ENGLISH if size else ())


def split_name(text: str) -> tuple[str, str]:
    """The text before a colon and the text after it; the path of a file may have colons itself."""
    for name, _, option in ((text, "", ""), text.rpartition(":")):
        if name and given_path(name).is_file():
            return name, option
    name, _, option = text.partition(":")
    return name, option


def known_sources() -> dict[str, KnownSource]:
    """The sources of the package and the registered ones, by name."""
    return _shipped() | _registered


def register_sources(path: Path) -> None:
    """Adds the sources of a YAML file, in the format of sources.yaml, to the known ones in this process.

    Args:
        path: the file. Its `local` paths are absolute or relative to its folder, and may name .jsonl or .parquet files.

    Raises:
        AdaPrunerError: the file cannot be read, or a name in it is known already or invalid.
    """
    try:
        entries = _ENTRIES.validate_python(parse_yaml(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise AdaPrunerError(f"cannot read the sources in {path}: {reason(error)}") from None
    folder = path.absolute().parent
    for name, entry in entries.items():
        local = {split: str(folder / file) for split, file in entry.local.items()}
        source = entries[name] = entry.model_copy(update={"local": local})
        if name in ("", "hf", MIX, ANSWERS[:-1]) or set(name) & set(":@/") or name.endswith(_FILES):
            raise AdaPrunerError(f"{path}: {name!r} cannot name a source: choose letters and digits")
        if source.hub is None and not source.local:
            raise AdaPrunerError(f"{path}: {name} has neither `hub` nor `local`: say where its data is")
        if known_sources().get(name, source) != source:
            raise AdaPrunerError(f"{path}: there is another source named {name}: choose another name")
    _registered.update(entries)


_ENTRIES = TypeAdapter(dict[str, KnownSource])
_registered: dict[str, KnownSource] = {}


@cache
def _shipped() -> dict[str, KnownSource]:
    text = (resources.files("adapruner.text") / "sources.yaml").read_text(encoding="utf-8")
    return _ENTRIES.validate_python(parse_yaml(text))


def _is_folder(path: str) -> bool:
    return bool(path) and given_path(path).is_dir()
