"""Reading datasets: rows of text from files, saved folders and the Hub; what does not change is read once."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adapruner.calibration._sources import (
    HubData,
    Part,
    Place,
    Source,
    known_sources,
    place_of,
    refuse_missing,
    split_name,
)
from adapruner.errors import AdaPrunerError, reason

# Tenths of the documents, by hash, that belong to each part.
_TENTHS: dict[str, range] = {"calibration": range(0, 4), "objective": range(4, 6), "report": range(6, 10)}
# Columns that are taken where none is named; the second is the form of Stanford Alpaca.
_USUAL_COLUMNS = (("text",), ("instruction", "input", "output"), ("instruction", "output"))

# The tensor in a file of windows.
WINDOWS = "windows"

# Text by column.
Row = dict[str, str | None]


def read_documents(source: Source) -> list[str]:
    """All documents of a source (or of its part), in their order.

    Raises:
        AdaPrunerError: it cannot be read, or has no text.
    """
    documents = [joined(row) for row in read_records(source)]
    if not any(document.strip() for document in documents):
        raise AdaPrunerError(f"there is no text in {source}")
    return documents


def read_records(source: Source) -> list[Row]:
    """All rows of a source (or of its part) by column, in their order; of plain text, `text` alone.

    Raises:
        AdaPrunerError: it cannot be read.
    """
    return [row for row in _rows_of(source)[0] if is_of_part(joined(row), source.part)]


def read_windows(source: Source) -> Tensor:
    """[windows, tokens], int64: the windows of tokens in a `.safetensors` file (or of its part), in their order.

    Windows are put into parts by the hash of their tokens.

    Raises:
        AdaPrunerError: it cannot be read, or holds something else.
    """
    path = place_of(source).path
    assert path is not None
    with reading(source):
        try:
            windows = load_file(path).get(WINDOWS)
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        if windows is None or windows.dtype != torch.int64 or windows.dim() != 2:
            raise ValueError(f"it holds no tensor {WINDOWS!r} of tokens, int64, of shape [windows, tokens]")
        if windows.numel() and windows.min() < 0:
            raise ValueError(f"it holds {int(windows.min())} in place of a token")
    return windows[torch.tensor([is_of_part(str(one), source.part) for one in windows.tolist()], dtype=torch.bool)]


def provenance(source: Source) -> dict[str, str]:
    """Which dataset, split and revision a source is; a local file by the hash of its content.

    Raises:
        AdaPrunerError: it cannot be read.
    """
    place = place_of(source)
    if source.holds_windows and place.path is not None:
        return {"data_set": place.name, "revision": f"sha256 {_hash_of_file(place.path)[:12]}"}
    _, about = _rows_of(source)
    return {name: value for name, value in about.items() if value}


def fingerprint(source: Source) -> str | None:
    """Identifies what is read from a source; nothing is parsed, and the network is not used.

    Returns:
        `content_hash`, and of a known source a hash of it and of the entry in sources.yaml. None if a local file is
        missing.
    """
    content = content_hash(source)
    known = known_sources().get(split_name(source.name)[0])
    if known is None or content is None:
        return content
    return _hash(known.model_dump_json(exclude={"local"}), content)


def content_hash(source: Source) -> str | None:
    """The SHA-256 of a local file. Of a saved folder, a hash of the state that `datasets` saved and the sizes of its
    files; for a Hub dataset, a hash of the arguments it is loaded with. None if a local file is missing."""
    place = place_of(source)
    if place.path is None:
        assert place.hub is not None
        return _hash(place.hub.model_dump_json(), place.split, *_sizes(Path(place.hub.path)))
    if place.path.is_file():
        return _hash_of_file(place.path)
    if place.path.is_dir():
        state = place.path / "state.json"
        return _hash(state.read_text(encoding="utf-8") if state.is_file() else "", *_sizes(place.path))
    return None


def _hash_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sizes(folder: Path) -> list[str]:
    return [f"{file.relative_to(folder)} {file.stat().st_size}" for file in _files_in(folder)]


def _files_in(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _rows_of(source: Source) -> tuple[list[Row], dict[str, str]]:
    """All rows, and which dataset, split and revision they are of."""
    place = place_of(source)
    with reading(source):
        local = place.path if place.hub is None or place.path is not None else Path(place.hub.path)
        assert local is not None
        stamps = [(str(file.absolute()), file.stat()) for file in _files_in(local)]
        return _read(place, tuple((name, each.st_ino, each.st_size, each.st_mtime_ns) for name, each in stamps))


@contextlib.contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turns what libraries raise over a dataset into one line.

    Raises:
        AdaPrunerError: in their place, or because a local file is missing.
    """
    refuse_missing(place_of(source))
    try:
        yield
    except StopIteration:  # what datasets makes of an empty file
        raise AdaPrunerError(f"cannot read {source.name!r}: there is nothing in it") from None
    except (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise AdaPrunerError(f"cannot read {source.name!r}: {reason(error.__cause__ or error)}") from error


@lru_cache(maxsize=4)
def _read(place: Place, stamp: tuple[object, ...]) -> tuple[list[Row], dict[str, str]]:
    """Reads what lies at a place.

    Args:
        stamp: of the local files, so that changed ones are read again.
    """
    if place.path is None:
        assert place.hub is not None
        name = " ".join(filter(None, (place.hub.path, place.hub.name)))
        rows, revision = _read_hub(place, place.hub)
    elif place.path.is_dir():
        dataset = datasets.load_from_disk(str(place.path))
        name, revision = place.name, f"local copy {dataset._fingerprint}"
        rows = list(columns_of(dataset, place.columns, place.limit))
    else:
        name, revision = place.name, f"sha256 {_hash_of_file(place.path)[:12]}"
        rows = _read_file(place, place.path)
    return rows, {"data_set": name, "split": place.split, "revision": revision}


def _read_hub(place: Place, hub: HubData) -> tuple[list[Row], str]:
    """The rows of a Hub dataset, and its revision."""
    arguments = hub.model_dump(exclude_none=True)
    with quiet_datasets():
        dataset = datasets.load_dataset(**arguments, split=place.split, streaming=place.limit is not None)
        columns = place.columns
        if place.limit is None:  # a streamed dataset may not know its columns
            columns = text_columns(dataset.column_names, hub.path, columns)
        rows = list(columns_of(dataset, columns, place.limit))
    # The commit that was read is part of the addresses of the files, where they were downloaded.
    commit = re.search(r"@([0-9a-f]{40})/", " ".join(dataset.info.download_checksums or {}))
    return rows, commit[1][:12] if commit else hub.revision or "main"


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silences datasets and the Hub for a while: what they log about a broken file or no network, they raise too."""
    verbosity, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    of_hub = hub_logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub_logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(of_hub)
        if bars:
            datasets.enable_progress_bars()


def _read_file(place: Place, path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        names = pyarrow.parquet.read_schema(path).names
        columns = text_columns(names, str(path), place.columns)
        rows = pyarrow.parquet.read_table(path, columns=list(columns)).to_pylist()
        return list(columns_of(rows, columns, place.limit))
    if path.suffix in (".jsonl", ".json"):
        rows = _read_json(path)
        columns = text_columns(list(dict.fromkeys(name for row in rows for name in row)), str(path), place.columns)
        return list(columns_of(rows, columns, place.limit))
    if path.suffix == ".safetensors":
        raise ValueError("it holds windows of tokens, where text is needed")
    # Some editors begin a file with a mark that is no part of the text.
    text = path.read_text(encoding="utf-8-sig")
    if place.lines == "paragraphs":
        paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
        texts = paragraphs if len(paragraphs) > 1 else text.splitlines()
    else:
        lines = text.splitlines(keepends=True)
        texts = [(line if line.strip() else "") if place.lines == "keep" else line.strip() for line in lines]
    return [{"text": each} for each in texts[: place.limit]]


def _read_json(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line, or of one with a list of them.

    Raises:
        ValueError: it holds something else; with the place.
    """
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        records = {f"entry {number}": record for number, record in enumerate(_parsed(text, "it"), 1)}
    else:
        lines = {f"line {number}": line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
        records = {place: _parsed(line, place) for place, line in lines.items()}
    if not records:
        raise ValueError("there is nothing in it")
    return [_checked(record, place) for place, record in records.items()]


def parsed_line(line: str, place: str) -> dict[str, Any]:
    """The object on a line of a file.

    Args:
        place: which line, for messages.

    Raises:
        ValueError: it is something else; with the place.
    """
    return _checked(_parsed(line, place), place)


def _checked(record: Any, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f'{place} is no JSON object with fields, as {{"text": …}}')
    return record


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON: {getattr(error, 'msg', reason(error))}") from None


def text_columns(columns: list[str], name: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that hold the text.

    Args:
        columns: existing ones.
        name: of the dataset, for messages.
        wanted: those that the user named.
    """
    if wanted and set(wanted) <= set(columns):
        return wanted
    if wanted or not columns:
        missing = ", ".join(column for column in wanted if column not in columns) or "text"
        raise AdaPrunerError(f"{name} has the columns {', '.join(columns) or 'of no name'}, but no {missing}")
    for usual in _USUAL_COLUMNS:
        if set(usual) <= set(columns):
            return usual
    if len(columns) == 1:
        return tuple(columns)
    raise AdaPrunerError(
        f"{name} has the columns {', '.join(columns)}: say which holds the text, as {name}:COLUMN; instructions with"
        " answers have the columns instruction, output and perhaps input"
    )


def columns_of(rows: Iterable[dict[str, Any]], columns: tuple[str, ...], limit: int | None) -> Iterator[Row]:
    """The texts of rows, at most `limit` of them, as they are read."""
    for number, row in enumerate(itertools.islice(rows, limit), 1):
        yield {column: _text_of(row, column, number) for column in columns}


def _text_of(row: dict[str, Any], column: str, number: int) -> str | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, dict | list):
        raise ValueError(f"{column} of record {number} is no text but a {type(value).__name__}")
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
        text.encode()  # refuses half of a surrogate pair, which JSON can hold
    except UnicodeError:
        raise ValueError(f"{column} of record {number} is not valid Unicode text") from None
    return text


def text_rows(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Row]:
    """The columns with the text, of rows whose first one says which these are.

    Args:
        name: what the rows are, for messages.

    Raises:
        AdaPrunerError: there is no such column, or it holds something else than text.
    """
    rows = iter(rows)
    for first in rows:
        columns = text_columns(list(first), f"`{name}`", ())
        try:
            yield from columns_of(itertools.chain([first], rows), columns, None)
        except ValueError as error:
            raise AdaPrunerError(f"`{name}`: {error}") from None


def joined(row: Row) -> str:
    """The document that a row is."""
    return "\n".join(value for value in row.values() if value)


def is_of_part(document: str, part: Part) -> bool:
    """Whether a document belongs to a part, by the hash of its text."""
    tenths = _TENTHS.get(part)
    return tenths is None or int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") % 10 in tenths
