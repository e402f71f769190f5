"""Writing files so that what exists is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from adapruner.errors import AdaPrunerError

_LINKED = 1 << 22
# Reading it means setting it.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside its place and renames it (see `being_written`).

    Args:
        write: given where to write.
    """
    with being_written(path) as partial:
        write(partial)


@contextlib.contextmanager
def being_written(path: Path, writer: str = "") -> Iterator[Path]:
    """A path to write a file to, which is moved to its place, on the disk, if the block ends without an error.

    Args:
        writer: part of the name beside, where several processes may write the same.

    Raises:
        AdaPrunerError: it cannot be written, which leaves what was there.
    """
    partial = path.with_name(f"{path.name}{writer}.partial")
    with saying_what_cannot_be_written(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def replace(partial: Path, path: Path) -> None:
    """Puts a finished file or folder in its place, once all of it is on the disk; what was there is removed."""
    for part in (*partial.rglob("*"), partial):
        if part.is_file():
            _open_to_readers(part)
        _flush(part)
    # A folder is never half removed, whenever this is killed.
    old = path.with_name(f".{path.name}.old")
    if path.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    elif partial.is_dir():
        path.unlink(missing_ok=True)
    os.replace(partial, path)
    shutil.rmtree(old, ignore_errors=True)
    _flush(path.parent)


@contextlib.contextmanager
def saying_what_cannot_be_written(path: Path) -> Iterator[None]:
    """Turns failures to write into one line.

    Raises:
        AdaPrunerError: in place of an error of the system.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise AdaPrunerError(f"cannot write {path}: {cause}. What was written before is kept") from None


def copy_folder(source: Path, target: Path) -> None:
    """Copies a folder; large files are linked where the file system can."""
    for file in (file for file in source.rglob("*") if file.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(file, place)


def link_or_copy(source: Path, target: Path) -> None:
    """Small files are copied: people edit them in place."""
    if source.stat().st_size > _LINKED:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy(source, target)


def _open_to_readers(path: Path) -> None:
    """Gives a file the mode that new files get here: safetensors from 0.8 on writes what nobody but the owner can
    read (huggingface/safetensors issue 782)."""
    path.chmod(0o666 & ~_UMASK)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
