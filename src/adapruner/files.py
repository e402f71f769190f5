"""Writing files so that what exists is whole, and telling whether it still is what was written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from adapruner.errors import AdaPrunerError

_PIECE = 1 << 20
# Reading it means setting it.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def write_atomically(path: Path, write: Callable[[Path], Any], writer: str = "") -> None:
    """Writes a file beside its place and renames it (see `being_written`).

    Args:
        write: given where to write.
    """
    with being_written(path, writer) as partial:
        write(partial)


@contextlib.contextmanager
def being_written(path: Path, writer: str = "") -> Iterator[Path]:
    """Where to write a file that comes to its place, on the disk, once the block has ended well.

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
            _open_to_readers(partial)
            _flush(partial)
            os.replace(partial, path)
            _flush(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def replace_folder(partial: Path, folder: Path) -> None:
    """Puts a finished folder in its place, once all that is in it is on the disk; what was there goes."""
    for path in (*partial.rglob("*"), partial):
        if path.is_file():
            _open_to_readers(path)
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _flush(folder.parent)


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
        raise AdaPrunerError(f"cannot write {path}: {cause}. What was written before stays") from None


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


@dataclass(frozen=True)
class Manifest:
    """What the files of a folder are, by SHA-256, in `manifest.json`.

    A file that was rewritten has its last two there: a kill may come between the manifest and the file. Files that are
    not named were finished just before a kill.
    """

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "manifest.json"

    def write(self, path: Path, write: Callable[[Path], Any]) -> None:
        """Writes a file of the folder atomically, and names it."""
        with being_written(path) as partial:
            write(partial)
            digests = self._read()
            name = self._name(path)
            self._save(digests | {name: [*digests.get(name, [])[-1:], _digest(partial)]})

    def name(self, paths: Iterable[Path]) -> None:
        """Names files of the folder as they are now."""
        self._save(self._read() | {self._name(path): [_digest(path)] for path in paths})

    def forget(self, path: Path) -> None:
        """Drops a file, or all files of a folder."""
        own = self._name(path)
        digests = self._read()
        left = {name: each for name, each in digests.items() if name != own and not name.startswith(f"{own}/")}
        if left != digests:
            self._save(left)

    def take_over(self, earlier: Manifest, paths: Iterable[Path]) -> None:
        """Names files that were copied here as they are named there."""
        digests = earlier._read()
        self._save(self._read() | {name: digests[name] for name in map(self._name, paths) if name in digests})

    def missing(self) -> list[Path]:
        """The named files that are not there."""
        return [path for path in map(self.folder.joinpath, self._read()) if not path.exists()]

    def damaged(self) -> list[Path]:
        """The named files that are there but are not what was written."""
        named = {self.folder / name: digests for name, digests in self._read().items()}
        return [path for path, digests in named.items() if path.is_file() and _digest(path) not in digests]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _read(self) -> dict[str, list[str]]:
        """What can be read: a manifest that was cut off or edited says nothing."""
        try:
            content = json.loads(self.path.read_text())
            return {str(name): [str(digest) for digest in digests] for name, digests in content.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _save(self, digests: dict[str, list[str]]) -> None:
        write_atomically(self.path, lambda partial: partial.write_text(json.dumps(digests, indent=2) + "\n"))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
