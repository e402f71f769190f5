"""Reading datasets: rows of text from files, saved folders and the Hub, held and kept, or one after the other."""

import contextlib
import hashlib
import io
import itertools
import json
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow.parquet
import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adapruner.base.errors import AdaPrunerError, reason
from adapruner.text.installed import INSTALLED
from adapruner.text.sources import Lines, Part, Source, known_sources, split_name

# Tenths of the documents, by hash, that belong to each part.
_TENTHS_OF_PARTS: dict[str, range] = {"calibration": range(0, 4), "objective": range(4, 6), "report": range(6, 10)}
# Columns that are read if the user names none; the second entry is the form of Stanford Alpaca.
_USUAL_COLUMNS = (("text",), ("instruction", "input", "output"), ("instruction", "output"))

# The tensor in a file of windows.
WINDOWS = "windows"

_PYTHON = f"Python {platform.python_version()}"

# Text by column.
Row = dict[str, str | None]


def read_documents(source: Source) -> list[str]:
    """All documents of a source (or of its part), in their order."""
    documents = [_joined(row) for row in read_records(source)]
    if not any(document.strip() for document in documents):
        raise AdaPrunerError(f"there is no text in {source}")
    return documents


def stream_documents(source: Source) -> Iterator[str]:
    """The documents that `read_documents` gives, in their order, without holding them in memory."""
    has_text = False
    with _reading(source):
        for row in _open(source, streamed=True)[0]:
            document = _joined(row)
            if is_of_part(document, source.part):
                has_text = has_text or bool(document.strip())
                yield document
    if not has_text:
        raise AdaPrunerError(f"there is no text in {source}")


def read_records(source: Source) -> list[Row]:
    """All rows of a source (or of its part) by column, in their order; plain text has the column `text`."""
    return [row for row in _held(source)[0] if is_of_part(_joined(row), source.part)]


def read_windows(source: Source) -> Tensor:
    """[windows, tokens], int64: the windows of tokens in a `.safetensors` file (or of its part), in their order. They
    are put into parts by the hash of their tokens."""
    assert source.path is not None
    with _reading(source):
        try:
            tensors = load_file(source.path)
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        windows = tensors.get(WINDOWS)
        if windows is None or windows.dtype != torch.int64 or windows.dim() != 2:
            raise ValueError(f"it holds no tensor {WINDOWS!r} of tokens, int64, of shape [windows, tokens]")
        if windows.numel() and windows.min() < 0:
            raise ValueError(f"it holds {int(windows.min())}, which is not a token")
    is_read = [is_of_part(str(window), source.part) for window in windows.tolist()]
    return windows[torch.tensor(is_read, dtype=torch.bool)]


def provenance(source: Source) -> dict[str, str]:
    """Dataset, split and revision of a source; the revision of a local file is the hash of its content."""
    if source.holds_windows and source.path is not None:
        return {"data_set": source.dataset, "revision": _revision_of_file(source.path)}
    name = source.dataset
    if source.path is None and source.hub is not None:
        name = " ".join(filter(None, (source.hub.path, source.hub.name)))
    about = {"data_set": name, "split": source.split, "revision": _held(source)[1]}
    return {key: value for key, value in about.items() if value}


def fingerprint(source: Source) -> str | None:
    """`content_hash`, and of a known source a hash of it and of the entry in sources.yaml; None if a local file is
    missing. Nothing is parsed, and the network is not used."""
    content = content_hash(source)
    known = known_sources().get(split_name(source.name)[0])
    if known is None or content is None:
        return content
    return _hash(known.model_dump_json(exclude={"local", "installed"}), content)


def content_hash(source: Source) -> str | None:
    """The SHA-256 of a local file. Of a saved folder, a hash of the state that `datasets` saved and the sizes of its
    files; for a Hub dataset, a hash of the arguments it is loaded with; for what Python has, a hash of its
    version. None if a local file is missing."""
    path = source.path
    if source.installed:
        return _hash(source.installed, _PYTHON)
    if path is None:
        assert source.hub is not None
        return _hash(source.hub.model_dump_json(), source.split, *_sizes(Path(source.hub.path)))
    if path.is_file():
        return _hash_of_file(path)
    if path.is_dir():
        state = path / "state.json"
        return _hash(state.read_text(encoding="utf-8") if state.is_file() else "", *_sizes(path))
    return None


def _hash_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _revision_of_file(path: Path) -> str:
    return f"sha256 {_hash_of_file(path)[:12]}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sizes(folder: Path) -> list[str]:
    return [f"{file.relative_to(folder)} {file.stat().st_size}" for file in _files_in(folder)]


def _files_in(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _held(source: Source) -> tuple[list[Row], str]:
    """All rows of all parts, and their revision; read again only if the local files changed."""
    with _reading(source):
        local = source.path or (Path(source.hub.path) if source.hub else None)
        stamps = [(str(file.absolute()), file.stat()) for file in (_files_in(local) if local else ())]
        stamp = tuple((name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in stamps)
        return _read(replace(source, part="all"), stamp)


@lru_cache(maxsize=4)
def _read(source: Source, stamp: tuple[object, ...]) -> tuple[list[Row], str]:
    rows, revision = _open(source)
    return list(rows), _revision_of_file(source.path) if source.path and source.path.is_file() else revision


@contextlib.contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Turns errors of the libraries that read datasets into one line, and silences their logs, which say the same;
    refuses a local file that is missing."""
    source.refuse_missing()
    verbosity, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub_logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    except StopIteration:  # raised by datasets for an empty file
        raise AdaPrunerError(f"cannot read {source.name!r}: there is nothing in it") from None
    except (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise AdaPrunerError(f"cannot read {source.name!r}: {reason(error.__cause__ or error)}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            datasets.enable_progress_bars()


def _open(source: Source, streamed: bool = False) -> tuple[Iterator[Row], str]:
    """The rows of a source, read one after the other, and their revision; the revision of a file is empty. Streamed, no
    more of a Hub dataset is downloaded than is read, and nothing of it kept."""
    path = source.path
    if source.installed:
        return iter([{"text": document} for document in INSTALLED[source.installed]()]), _PYTHON
    if path is not None and path.is_file():
        return _rows_of_file(source, path), ""
    if path is not None:
        dataset = datasets.load_from_disk(str(path))
        rows = _rows_of_records(dataset, str(path), source.named_columns, source.limit)
        return rows, f"local copy {dataset._fingerprint}"
    hub = source.hub
    assert hub is not None
    streamed = streamed or source.limit is not None
    dataset = datasets.load_dataset(**hub.model_dump(exclude_none=True), split=source.split, streaming=streamed)
    # The commit that was read is part of the addresses of the files, where they were downloaded.
    commit = re.search(r"@([0-9a-f]{40})/", " ".join(dataset.info.download_checksums or {}))
    rows = _rows_of_records(dataset, hub.path, source.named_columns, source.limit)
    return rows, commit[1][:12] if commit else hub.revision or "main"


def _rows_of_file(source: Source, path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _text_columns(file.schema_arrow.names, str(path), source.named_columns)
            batches = file.iter_batches(columns=list(columns))
            yield from _texts((record for batch in batches for record in batch.to_pylist()), columns, source.limit)
    elif path.suffix in (".jsonl", ".json"):
        # Read twice, because a record may have columns that the earlier ones do not have.
        names = dict.fromkeys(name for record in _json_records(path) for name in record)
        if not names:
            raise ValueError("there is nothing in it")
        columns = _text_columns(list(names), str(path), source.named_columns)
        records = _json_records(path)
        yield from _texts(records if source.named_columns else _alike(records, columns), columns, source.limit)
    elif source.holds_windows:
        raise ValueError("it holds windows of tokens, where text is needed")
    else:
        for document in itertools.islice(_plain_documents(path, source.lines), source.limit):
            yield {"text": document}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A text file, without the byte order mark of some editors. The error of what is not UTF-8 has the place in the
    file, while the decoder knows only the place in its buffer."""
    with path.open("rb") as content, io.TextIOWrapper(content, encoding="utf-8-sig") as file:
        # Letters of UTF-16 are valid UTF-8, each with a NUL.
        if b"\0" in content.peek():
            raise ValueError("it has NUL characters, which text has not: write it in UTF-8")
        try:
            yield file
        except UnicodeDecodeError as error:
            place = content.tell() - len(error.object) + error.start
            raise ValueError(f"it is not UTF-8 text: byte {place} is invalid") from None


def _json_records(path: Path) -> Iterator[dict[str, object]]:
    """The objects of a file with one on each line, or of a .json file with a list of them."""
    with _opened(path) as file:
        lines = ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())
        first = next(lines, None)
        if first is None:
            return
        if path.suffix == ".json" and first[1].lstrip().startswith("["):
            entries = enumerate(_parsed("it", first[1] + file.read()), 1)
            values = ((f"entry {number}", entry) for number, entry in entries)
        else:
            values = ((place, _parsed(place, line)) for place, line in itertools.chain([first], lines))
        for place, value in values:
            if not isinstance(value, dict):
                raise ValueError(f'{place} is not a JSON object with fields, as {{"text": …}}')
            yield value


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {getattr(error, 'msg', reason(error))}") from None


def _plain_documents(path: Path, lines: Lines) -> Iterator[str]:
    """The documents of a plain text file: its paragraphs, if `lines` says so and there are several, else its lines."""
    with _opened(path) as file:
        if lines == "paragraphs":
            before = itertools.dropwhile(lambda line: not line.strip(), file)
            after = itertools.dropwhile(lambda line: line != "\n", before)
            has_several = any(line.strip() for line in after)
            file.seek(0)
            if has_several:
                yield from filter(str.strip, _paragraphs(file))
                return
        # A line of the file may hold other line separators, such as form feeds.
        for line in (line for lines_of_text in file for line in lines_of_text.splitlines(keepends=True)):
            if lines == "keep":
                yield line if line.strip() else ""
            else:
                yield line.strip() if lines == "strip" else line.splitlines()[0]


def _paragraphs(file: Iterable[str]) -> Iterator[str]:
    """The result of `split("\\n\\n")` on a text that is given line by line."""
    lines: list[str] = []
    for line in file:
        if line == "\n" and lines:
            yield "".join(lines)[:-1]
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def _text_columns(columns: list[str], name: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the columns that hold the text: the ones that the user named, or else the usual ones."""
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


def _rows_of_records(
    records: Iterable[dict[str, object]], name: str, wanted: tuple[str, ...] = (), limit: int | None = None
) -> Iterator[Row]:
    """The texts of records, in the columns that the first record has; see `_text_columns`."""
    records = iter(records)
    for first in itertools.islice(records, 1):
        columns = _text_columns(list(first), name, wanted)
        records = itertools.chain([first], records)
        yield from _texts(records if wanted else _alike(records, columns), columns, limit)


def _alike(records: Iterable[dict[str, object]], columns: tuple[str, ...]) -> Iterator[dict[str, object]]:
    """Records, as they are read; refuses one that has none of the columns, but others."""
    for number, record in enumerate(records, 1):
        if record and record.keys().isdisjoint(columns):
            lacking, present = (", ".join(names) for names in (columns, record))
            raise ValueError(
                f"record {number} has {present}, but no {lacking}: give all records the same columns, or name those to"
                " read, which leaves other records out"
            )
        yield record


def _texts(records: Iterable[dict[str, object]], columns: tuple[str, ...], limit: int | None) -> Iterator[Row]:
    """The texts of records in some columns, at most `limit` of them, as they are read."""
    for number, record in enumerate(itertools.islice(records, limit), 1):
        yield {column: _text_of(record, column, number) for column in columns}


def _text_of(record: dict[str, object], column: str, number: int) -> str | None:
    value = record.get(column)
    if value is None or value != value:  # NaN, as pandas writes missing values
        return None
    if isinstance(value, dict | list):
        raise ValueError(f"{column} of record {number} is not text but a {type(value).__name__}")
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
        text.encode()  # refuses half of a surrogate pair, which JSON can hold
    except UnicodeError:
        raise ValueError(f"{column} of record {number} is not valid Unicode text") from None
    return text


def text_rows(records: Iterable[dict[str, object]], name: str) -> Iterator[Row]:
    """The text of records in memory, by column; the first record decides which columns hold text. Refuses records
    without text; the name is for messages."""
    try:
        yield from _rows_of_records(records, f"`{name}`")
    except ValueError as error:
        raise AdaPrunerError(f"`{name}`: {error}") from None


def _joined(row: Row) -> str:
    """The document of a row."""
    return "\n".join(value for value in row.values() if value)


def is_of_part(document: str, part: Part) -> bool:
    """True for a document of a part, by the hash of its text."""
    tenth = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") % 10
    return tenth in _TENTHS_OF_PARTS.get(part, range(10))
