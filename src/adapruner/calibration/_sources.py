"""Where text comes from: named data sets, files, any data set of the hub, and three disjoint parts of each."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast, get_args

import datasets
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in __all__
from pydantic import BaseModel, ConfigDict

from adapruner.errors import AdaPrunerError, reason
from adapruner.local_data import find_local_data
from adapruner.paths import given_path

Part = Literal["all", "calibration", "objective", "report"]

SELF_GENERATED = "self"

# Tenths of the documents, by hash, that belong to each part.
_TENTHS: dict[str, range] = {"calibration": range(0, 4), "objective": range(4, 6), "report": range(6, 10)}
_FILES = (".txt", ".jsonl", ".json", ".parquet")
_FORMS = "a .txt, .jsonl or .parquet file, or hf:owner/name[:config][:split][:column]"
# Columns that are taken where nothing else is said; the second is the form of Stanford Alpaca.
_USUAL_COLUMNS = (("text",), ("instruction", "input", "output"), ("instruction", "output"))


@dataclass(frozen=True)
class Source:
    """A text source as the user wrote it, and which part of its documents is meant.

    Attributes:
        name: the source without the part, for example `boolq-passages`, `notes.txt` or `hf:owner/name::train:text`.
        part: `all`, or one of three disjoint parts into which the documents fall by the hash of their text.
    """

    name: str
    part: Part = "all"

    @property
    def identity(self) -> str:
        """The same for two names of the same documents: a data set with its split, whatever the column; a file by its
        absolute path."""
        name, option = _split(self.name)
        known = _known_sources().get(name)
        if known:
            return f"hf:{known.hub['path']}:{known.hub.get('name', '')}:{option or known.split}"
        if name == "hf":
            path, config, split, _ = _hub_parts(option)
            return f"hf:{path}:{config}:{split}"
        return str(Path(name).expanduser().resolve())

    def __str__(self) -> str:
        return self.name if self.part == "all" else f"{self.name}@{self.part}"

    def restrict(self, part: Part) -> Source:
        """The same source, restricted to a part unless the user already chose one."""
        return self if self.part != "all" else replace(self, part=part)


class _KnownSource(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    hub: dict[str, str]
    split: str
    columns: tuple[str, ...]
    local: dict[str, str] = {}
    lines: Literal["keep", "strip"] = "strip"
    limit: int | None = None


def parse_source(text: str) -> Source:
    """Reads `SRC` or `SRC@PART`.

    Raises:
        AdaPrunerError: no such name, file or part. Nothing is downloaded to find out.
    """
    name, at, part = text.rpartition("@")
    if not at or given_path(text).is_file():
        name, part = text, "all"
    if part not in get_args(Part):
        raise AdaPrunerError(f"unknown part {part!r} of {name!r}; the parts are {', '.join(_TENTHS)}")
    source = Source(name, cast(Part, part))
    _reader(source)
    return source


@dataclass(frozen=True)
class _Rows:
    """What was read: rows by column, and where from."""

    rows: list[dict[str, str | None]]
    data_set: str
    split: str
    revision: str


def read_documents(source: Source) -> list[str]:
    """All documents of a source (or of its part), in their order.

    Raises:
        AdaPrunerError: it cannot be read, or has no text.
    """
    documents = [_joined(row) for row in read_records(source)]
    if not any(document.strip() for document in documents):
        raise AdaPrunerError(f"there is no text in {source}")
    return documents


def read_records(source: Source) -> list[dict[str, str | None]]:
    """All rows of a source (or of its part) by column, in their order; of a text, `text` alone.

    Raises:
        AdaPrunerError: it cannot be read.
    """
    rows = _read(source).rows
    if source.part == "all":
        return rows
    tenths = _TENTHS[source.part]
    return [row for row in rows if _tenth(_joined(row)) in tenths]


def provenance(source: Source) -> dict[str, str]:
    """Which data set, split and revision a source is; a local file by the hash of its content.

    Raises:
        AdaPrunerError: it cannot be read.
    """
    read = _read(source)
    named = {"data_set": read.data_set, "split": read.split, "revision": read.revision}
    return {name: value for name, value in named.items() if value}


def _read(source: Source) -> _Rows:
    try:
        return _reader(source)()
    except StopIteration:  # what datasets makes of an empty file
        raise AdaPrunerError(f"cannot read {source.name!r}: there is nothing in it") from None
    except (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise AdaPrunerError(f"cannot read {source.name!r}: {reason(error.__cause__ or error)}") from error


def _joined(row: dict[str, str | None]) -> str:
    return "\n".join(value for value in row.values() if value)


def _tenth(document: str) -> int:
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") % 10


@cache
def _known_sources() -> dict[str, _KnownSource]:
    text = (resources.files("adapruner.calibration") / "sources.yaml").read_text()
    return {name: _KnownSource.model_validate(entry) for name, entry in yaml.safe_load(text).items()}


def _split(text: str) -> tuple[str, str]:
    """What stands before a colon and what behind it; the path of a file may have colons itself."""
    for name, _, option in ((text, "", ""), text.rpartition(":")):
        if name and given_path(name).is_file():
            return name, option
    name, _, option = text.partition(":")
    return name, option


def _reader(source: Source) -> Callable[[], _Rows]:
    """How to read a source, chosen by its name; raises if the name means nothing."""
    name, option = _split(source.name)
    if name == "hf":
        _refuse_malformed(option)
        return lambda: _read_hub(option)
    if name in _known_sources():
        return lambda: _read_known(name, _known_sources()[name], option)
    path = given_path(name)
    if path.suffix in _FILES:
        if not path.is_file():
            raise AdaPrunerError(f"there is no file {path}")
        return lambda: _read_file(path, option)
    if source.name == SELF_GENERATED:
        raise AdaPrunerError(f"{SELF_GENERATED!r} is text that the model generates; it can only be used to calibrate")
    close = difflib.get_close_matches(name, _known_sources(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise AdaPrunerError(
        f"unknown text source {source.name!r}: expected {', '.join(_known_sources())}, {SELF_GENERATED},"
        f" {_FORMS}.{hint}"
    )


def _read_known(name: str, known: _KnownSource, option: str) -> _Rows:
    split = option or known.split
    path = find_local_data(known.local[split]) if split in known.local else None
    if path is None:
        dataset = _load_dataset(known.hub, split, known.limit)
        return _from_dataset(dataset, known.columns, known.hub, split, known.limit)
    if path.is_dir():
        dataset = datasets.load_from_disk(str(path))
        rows = _columns_of(dataset, known.columns, known.limit)
        return _Rows(rows, name, split, f"local copy {dataset._fingerprint}")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    texts = [(line if line.strip() else "") if known.lines == "keep" else line.strip() for line in lines]
    return _Rows([{"text": text} for text in texts], name, split, _content_hash(path))


def _hub_parts(option: str) -> tuple[str, str, str, str]:
    """Path, config, split and column."""
    path, config, split, column = (*option.split(":"), "", "", "")[:4]
    return path, config, split or "train", column


def _read_hub(option: str) -> _Rows:
    path, config, split, column = _hub_parts(option)
    arguments = {"path": path} | ({"name": config} if config else {})
    dataset = _load_dataset(arguments, split, None)
    columns = _text_columns(dataset.column_names, path, column)
    return _from_dataset(dataset, columns, arguments, split)


def _refuse_malformed(option: str) -> None:
    path = option.partition(":")[0]
    try:
        if option.count(":") > 3:
            raise HFValidationError("it has more than four parts")
        if not given_path(path).is_dir() or not path:
            validate_repo_id(path)
    except HFValidationError as error:
        raise AdaPrunerError(f"'hf:{option}' names no data set, expected {_FORMS}: {reason(error)}") from None


def _read_file(path: Path, column: str) -> _Rows:
    if path.suffix == ".txt":
        # Some editors begin a file with a mark that is no part of the text.
        text = path.read_text(encoding="utf-8-sig")
        paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
        texts = paragraphs if len(paragraphs) > 1 else text.splitlines()
        return _Rows([{"text": text} for text in texts], path.name, "", _content_hash(path))
    if path.suffix == ".parquet":
        rows: Any = _load_dataset({"path": "parquet", "data_files": str(path)}, "train", None)
        names = rows.column_names
    else:
        rows = _read_json(path)
        names = list(dict.fromkeys(name for row in rows for name in row))
    columns = _text_columns(names, str(path), column)
    return _Rows(_columns_of(rows, columns), path.name, "", _content_hash(path))


def _read_json(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line, or of one with a list of them.

    Raises:
        ValueError: it holds something else; with the place.
    """
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        records: list[Any] = _parsed(text, "it")
        places = [f"entry {number}" for number in range(1, len(records) + 1)]
    else:
        lines = {f"line {number}": line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
        records = [_parsed(line, place) for place, line in lines.items()]
        places = list(lines)
    if not records:
        raise ValueError("there is nothing in it")
    for place, record in zip(places, records, strict=True):
        if not isinstance(record, dict):
            raise ValueError(f'{place} is no JSON object with fields, as {{"text": …}}')
    return records


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON: {getattr(error, 'msg', reason(error))}") from None


def _content_hash(path: Path) -> str:
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def _load_dataset(arguments: dict[str, str], split: str, limit: int | None) -> Any:
    datasets.disable_progress_bars()
    # What it logs of a broken file, it raises too.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets.load_dataset(**arguments, split=split, streaming=limit is not None)


def _from_dataset(
    dataset: Any, columns: tuple[str, ...], arguments: dict[str, str], split: str, limit: int | None = None
) -> _Rows:
    # The commit that was read is part of the addresses of the files, where they were downloaded.
    addresses = " ".join(dataset.info.download_checksums or {})
    commit = re.search(r"@([0-9a-f]{40})/", addresses)
    revision = commit[1][:12] if commit else arguments.get("revision", "main")
    name = " ".join(arguments[key] for key in ("path", "name") if key in arguments)
    return _Rows(_columns_of(dataset, columns, limit), name, split, revision)


def _text_columns(columns: list[str], name: str, wanted: str) -> tuple[str, ...]:
    if wanted in columns:
        return (wanted,)
    if wanted or not columns:
        raise AdaPrunerError(f"{name} has the columns {', '.join(columns) or 'of no name'}, but no {wanted or 'text'}")
    for usual in _USUAL_COLUMNS:
        if set(usual) <= set(columns):
            return usual
    if len(columns) == 1:
        return tuple(columns)
    raise AdaPrunerError(
        f"{name} has the columns {', '.join(columns)}: say which holds the text, as {name}:COLUMN; instructions with"
        " answers have the columns instruction, output and perhaps input"
    )


def _columns_of(
    rows: Iterable[dict[str, Any]], columns: tuple[str, ...], limit: int | None = None
) -> list[dict[str, str | None]]:
    return [
        {column: _text_of(row, column, number) for column in columns}
        for number, row in enumerate(itertools.islice(rows, limit), 1)
    ]


def _text_of(row: dict[str, Any], column: str, number: int) -> str | None:
    value = row.get(column)
    if isinstance(value, dict | list):
        raise ValueError(f"{column} of record {number} is no text but a {type(value).__name__}")
    return None if value is None else str(value)
