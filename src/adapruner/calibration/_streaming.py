"""Reading the documents of a dataset one after the other, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from adapruner.calibration._reading import (
    Row,
    columns_of,
    is_of_part,
    joined,
    parsed_line,
    quiet_datasets,
    read_documents,
    reading,
    text_columns,
)
from adapruner.calibration._sources import Place, Source, place_of
from adapruner.errors import AdaPrunerError

# Smaller files are read whole, as calibration reads them.
_STREAMED_FROM_BYTES = 64 * 2**20


def stream_documents(source: Source) -> Iterator[str]:
    """The documents that `read_documents` gives, in their order; files of 64 MiB and more, saved folders and Hub
    datasets are not held in memory.

    The columns of a streamed .jsonl file are those of its first record.

    Raises:
        AdaPrunerError: it cannot be read, or has no text.
    """
    place = place_of(source)
    is_small = place.path is not None and place.path.is_file() and place.path.stat().st_size < _STREAMED_FROM_BYTES
    if is_small or (place.path is not None and place.path.suffix == ".json"):
        yield from read_documents(source)
        return
    has_text = False
    with reading(source):
        for row in _rows(place):
            document = joined(row)
            if is_of_part(document, source.part):
                has_text = has_text or bool(document.strip())
                yield document
    if not has_text:
        raise AdaPrunerError(f"there is no text in {source}")


def _rows(place: Place) -> Iterator[Row]:
    if place.path is None:
        yield from _rows_of_hub(place)
    elif place.path.is_dir():
        yield from columns_of(datasets.load_from_disk(str(place.path)), place.columns, place.limit)
    elif place.path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(place.path) as file:
            columns = text_columns(file.schema_arrow.names, str(place.path), place.columns)
            batches = file.iter_batches(columns=list(columns))
            yield from columns_of((row for batch in batches for row in batch.to_pylist()), columns, place.limit)
    elif place.path.suffix == ".jsonl":
        yield from _rows_of_lines(place, place.path)
    else:
        for number, text in enumerate(_texts_of(place, place.path)):
            if number == place.limit:
                return
            yield {"text": text}


def _rows_of_hub(place: Place) -> Iterator[Row]:
    assert place.hub is not None
    with quiet_datasets():
        dataset: Iterable[dict[str, Any]] = datasets.load_dataset(
            **place.hub.model_dump(exclude_none=True), split=place.split, streaming=True
        )
        yield from _of_first_columns(iter(dataset), place, place.hub.path)


def _rows_of_lines(place: Place, path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        records = (parsed_line(line, f"line {number}") for number, line in enumerate(file, 1) if line.strip())
        yield from _of_first_columns(records, place, str(path))


def _of_first_columns(records: Iterator[dict[str, Any]], place: Place, name: str) -> Iterator[Row]:
    """The texts of records, in the columns that the first of them has."""
    for first in itertools.islice(records, 1):
        columns = text_columns(list(first), name, place.columns)
        yield from columns_of(itertools.chain([first], records), columns, place.limit)


def _texts_of(place: Place, path: Path) -> Iterator[str]:
    """The documents of a plain text file."""
    if place.lines == "paragraphs" and _has_paragraphs(path):
        yield from _paragraphs(path)
        return
    with path.open(encoding="utf-8-sig") as file:
        # A line of Python's may hold what `splitlines` takes for several, such as form feeds.
        for line in (line for lines in file for line in lines.splitlines(keepends=True)):
            if place.lines == "keep":
                yield line if line.strip() else ""
            else:
                yield line.strip() if place.lines == "strip" else line.splitlines()[0]


def _has_paragraphs(path: Path) -> bool:
    found: set[int] = set()
    for number, line in _numbered_lines(path):
        if line.strip():
            found.add(number)
        if len(found) > 1:
            return True
    return False


def _paragraphs(path: Path) -> Iterator[str]:
    """What stands between empty lines."""
    lines: list[str] = []
    current = 0
    for number, line in _numbered_lines(path):
        if number != current:
            paragraph = "".join(lines)[:-1]
            if paragraph.strip():
                yield paragraph
            lines, current = [], number
        lines.append(line)
    if (rest := "".join(lines)).strip():
        yield rest


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Every line with the number of its paragraph; as `str.split` does, a third line end begins a paragraph."""
    number, previous = 0, ""
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line == "\n" and previous.endswith("\n"):
                number, previous = number + 1, ""
                yield number, ""
            else:
                previous = line
                yield number, line
