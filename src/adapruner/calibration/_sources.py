"""Names of datasets: known ones, local files and Hub datasets, and the three disjoint parts of each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal, cast, get_args

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in __all__
from pydantic import BaseModel, ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from adapruner.errors import AdaPrunerError, reason
from adapruner.paths import find_local_data, given_path

Part = Literal["all", "calibration", "objective", "report"]
Purpose = Literal["train", "report"]
Lines = Literal["keep", "strip", "paragraphs"]

SELF_GENERATED = "self"

# Windows of tokens, in place of text.
_OF_WINDOWS = ".safetensors"
_FILES = (".txt", ".jsonl", ".json", ".parquet", _OF_WINDOWS)
_FORMS = "a .txt, .jsonl, .parquet or .safetensors file, or hf:owner/name[:config][:split][:column]"


@dataclass(frozen=True)
class Source:
    """A dataset as the user wrote it, and which part of its documents is meant.

    Attributes:
        name: without the part, for example `wikitext2:train`, `notes.txt` or `hf:owner/name::train:text`.
        part: `all`, or one of three disjoint parts, into which documents are put by the hash of their text.
    """

    name: str
    part: Part = "all"

    @property
    def identity(self) -> str:
        """The same for all names of one dataset, whatever the column: dataset and split, or the absolute path."""
        place = place_of(self)
        if place.hub is not None:
            path = given_path(place.hub.path).resolve() if _is_folder(place.hub.path) else place.hub.path
            return f"hf:{path}:{place.hub.name or ''}:{place.split}"
        return str(place.path and place.path.resolve())

    @property
    def columns(self) -> str:
        """The columns by whose text records are put into parts; empty where none is named and the usual ones count."""
        return ",".join(place_of(self).columns)

    @property
    def holds_windows(self) -> bool:
        """Whether it is a file of windows of tokens, in place of text."""
        path = place_of(self).path
        return path is not None and path.suffix == _OF_WINDOWS

    def __str__(self) -> str:
        return self.name if self.part == "all" else f"{self.name}@{self.part}"

    def restrict(self, part: Part) -> Source:
        """The same source, restricted to a part unless the user already chose one."""
        return self if self.part != "all" else replace(self, part=part)


class HubData(BaseModel):
    """Arguments of `datasets.load_dataset`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    name: str | None = None
    revision: str | None = None


class _Splits(TypedDict):
    train: str
    report: str


class KnownSource(BaseModel):
    """An entry of sources.yaml, where its fields are explained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hub: HubData | None = None
    split: str | _Splits
    columns: tuple[str, ...]
    local: dict[str, str] = {}
    lines: Lines = "strip"
    limit: int | None = None

    def default_split(self, purpose: Purpose) -> str:
        return self.split if isinstance(self.split, str) else self.split[purpose]


@dataclass(frozen=True)
class Place:
    """Where and how a source is read.

    Attributes:
        path: the local file or folder; None where it is read from the Hub.
        hub: None for a dataset that is only local.
        columns: empty where the usual ones are taken.
        lines: what the documents of a plain text file are: lines with or without their ends, or paragraphs between
            empty lines.
        limit: at most so many rows.
    """

    name: str
    path: Path | None
    hub: HubData | None
    split: str = ""
    columns: tuple[str, ...] = ()
    lines: Lines = "paragraphs"
    limit: int | None = None


def parse_source(text: str, purpose: Purpose = "train", missing_ok: bool = False) -> Source:
    """Reads `DATASET` or `DATASET@PART`. Where a known source has a split for each purpose, the name gets that split.

    Args:
        purpose: `train` to calibrate or train on, `report` to report perplexity on.
        missing_ok: whether a local file may be missing.

    Raises:
        AdaPrunerError: no such name, file or part. Nothing is downloaded to find out.
    """
    name, at, part = text.rpartition("@")
    # A path may have this sign too.
    is_path = given_path(text).is_file() or (text.startswith("hf:") and _is_folder(text[3:].partition(":")[0]))
    if not at or is_path or set(part) & set("/:"):
        name, part = text, "all"
    if part not in get_args(Part):
        raise AdaPrunerError(f"unknown part {part!r} of {name!r}; the parts are {', '.join(get_args(Part)[1:])}")
    known = known_sources().get(name)
    if known is not None and not isinstance(known.split, str):
        name = f"{name}:{known.default_split(purpose)}"
    _check_name(name)
    source = Source(name, cast(Part, part))
    if not missing_ok:
        refuse_missing(place_of(source))
    return source


def absolute_source(text: str) -> str:
    """A source with the path in it absolute, so that it means the same from any folder."""
    if text == SELF_GENERATED:
        return text
    source = parse_source(text, missing_ok=True)
    name, option = split_name(source.name)
    if name in known_sources():
        return text
    if name == "hf":
        path = option.partition(":")[0]
        return f"hf:{given_path(path).absolute()}{text[3 + len(path) :]}" if _is_folder(path) else text
    absolute = f"{given_path(name).absolute()}{f':{option}' if option else ''}"
    return str(replace(source, name=absolute))


def source_names(texts: Sequence[str]) -> list[str]:
    """The names of datasets, given one by one or several with commas; the path of a file may have commas itself."""
    names = []
    for text in texts:
        name, option = split_name(text)
        is_one = given_path(name).is_file() and "," not in option
        names += [text] if is_one else [part.strip() for part in text.split(",")]
    return [name for name in names if name]


def place_of(source: Source) -> Place:
    """Where a source is read from; nothing is read. A known source is read from its local copy if there is one."""
    name, option = split_name(source.name)
    if name == "hf":
        path, config, split, column = (*option.split(":"), "", "", "")[:4]
        path = str(given_path(path)) if _is_folder(path) else path
        return Place(path, None, HubData(path=path, name=config or None), split or "train", (column,) if column else ())
    known = known_sources().get(name)
    if known is None:
        return Place(given_path(name).name, given_path(name), None, columns=(option,) if option else ())
    split = option or known.default_split("train")
    local = find_local_data(known.local[split]) if split in known.local else None
    if local is None and known.hub is None:
        local = Path(known.local.get(split, f"{name}:{split}"))
    return Place(name, local, known.hub, split, known.columns, known.lines, known.limit)


def refuse_missing(place: Place) -> None:
    """Raises AdaPrunerError if a local file is missing."""
    if place.path is not None and not (place.path.is_file() or (place.split and place.path.is_dir())):
        raise AdaPrunerError(f"there is no file {place.path}")


def split_name(text: str) -> tuple[str, str]:
    """What stands before a colon and what behind it; the path of a file may have colons itself."""
    for name, _, option in ((text, "", ""), text.rpartition(":")):
        if name and given_path(name).is_file():
            return name, option
    name, _, option = text.partition(":")
    return name, option


def known_sources() -> dict[str, KnownSource]:
    """The sources known by name: those of the package and registered ones."""
    return _shipped() | _registered


def register_sources(path: Path) -> None:
    """Adds the sources of a YAML file of the format of sources.yaml to the known ones, in this process.

    Args:
        path: the file. Its `local` paths are absolute or relative to its folder, and may name .jsonl or .parquet files.

    Raises:
        AdaPrunerError: the file cannot be read, or a name in it is known already or not a name.
    """
    try:
        entries = _ENTRIES.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise AdaPrunerError(f"cannot read the sources in {path}: {reason(error)}") from None
    folder = path.absolute().parent
    sources = {
        name: entry.model_copy(update={"local": {split: str(folder / file) for split, file in entry.local.items()}})
        for name, entry in entries.items()
    }
    for name, source in sources.items():
        if name in ("", "hf", SELF_GENERATED) or set(name) & set(":@/") or name.endswith(_FILES):
            raise AdaPrunerError(f"{path}: {name!r} cannot name a source: choose letters and digits")
        if source.hub is None and not source.local:
            raise AdaPrunerError(f"{path}: {name} says neither in `hub` nor in `local` where its data is")
        if known_sources().get(name, source) != source:
            raise AdaPrunerError(f"{path}: there is another source named {name}: choose another name")
    _registered.update(sources)


_ENTRIES = TypeAdapter(dict[str, KnownSource])
_registered: dict[str, KnownSource] = {}


@cache
def _shipped() -> dict[str, KnownSource]:
    text = (resources.files("adapruner.calibration") / "sources.yaml").read_text(encoding="utf-8")
    return _ENTRIES.validate_python(yaml.safe_load(text))


def _is_folder(path: str) -> bool:
    return bool(path) and given_path(path).is_dir()


def _check_name(text: str) -> None:
    """Refuses what can name no dataset."""
    name, option = split_name(text)
    if name in known_sources() or (name != "hf" and given_path(name).suffix in _FILES):
        return
    if name != "hf":
        if text == SELF_GENERATED:
            raise AdaPrunerError(f"{text!r} is text that the model generates; it can only be used to calibrate")
        close = difflib.get_close_matches(name, known_sources(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise AdaPrunerError(
            f"unknown text source {text!r}: expected {', '.join(known_sources())}, {SELF_GENERATED}, {_FORMS}.{hint}"
        )
    path = option.partition(":")[0]
    try:
        if option.count(":") > 3:
            raise HFValidationError("it has more than four parts")
        if not _is_folder(path):
            validate_repo_id(path)
    except HFValidationError as error:
        raise AdaPrunerError(f"{text!r} names no dataset, expected {_FORMS}: {reason(error)}") from None
