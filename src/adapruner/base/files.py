"""Files: paths as users write them, YAML that may contain anything, and writing that leaves no file in part."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from adapruner.base.errors import AdaPrunerError, reason

_LINKED = 1 << 22
# Reading it means setting it.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file next to its place and renames it (see `atomic_path`).

    Args:
        write: called with the path to write to.
    """
    with atomic_path(path) as partial:
        write(partial)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 as `write_atomically` does."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_path(path: Path, writer: str = "") -> Iterator[Path]:
    """A path to write a file to. It is flushed to the disk and moved to its place if the block ends without an error.

    Args:
        writer: part of the temporary name, if several processes may write the same file.
    """
    partial = path.with_name(f"{path.name}{writer}.partial")
    with report_write_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def replace(partial: Path, path: Path) -> None:
    """Moves a finished file or folder to its place, once all of it is on the disk; replaces an existing one."""
    for file in (*partial.rglob("*"), partial):
        if file.is_file():
            # safetensors from 0.8 on writes files that only the owner can read (huggingface/safetensors issue 782).
            file.chmod(0o666 & ~_UMASK)
        _flush(file)
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


def is_whole(path: Path) -> bool:
    """True if a safetensors file exists and is as long as its header says."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


@contextlib.contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turns errors of the system into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise AdaPrunerError(f"cannot write {path}: {cause}. What was written before is kept") from None


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """A path in a new folder on the same disk, whose content can be moved to `path` once it is complete."""
    with report_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".adapruner-", dir=path.parent) as scratch:
            yield Path(scratch) / path.name


def copy_folder(source: Path, target: Path) -> None:
    """Copies a folder; large files are linked if the file system can."""
    for file in (file for file in source.rglob("*") if file.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(file, place)


def link_or_copy(source: Path, target: Path) -> None:
    """Links a file, or copies it if it is small: users edit small files in place. An existing file is replaced."""
    target.unlink(missing_ok=True)
    if source.stat().st_size > _LINKED:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy(source, target)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def given_path(name: str | Path) -> Path:
    """The path of a name, with the home folder for `~`; it need not exist."""
    try:
        path = Path(name).expanduser()
        str(path).encode()  # libraries read and write names that are text
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise AdaPrunerError(f"invalid path {str(name)!r}: {reason(error)}") from None
    return path


def output_path(name: str | Path) -> Path:
    """The path of a new file or folder; its parent need not exist."""
    path = given_path(name)
    if path.name in ("", ".."):
        raise AdaPrunerError(f"{str(name)!r} is not a name for a new file or folder: choose another output")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise AdaPrunerError(f"cannot write to {path}: {existing} is not a writable directory")
    # The target of a link is replaced, not the link.
    return path.resolve() if path.is_symlink() else path


def find_local_data(name: str) -> Path | None:
    """The file or folder of a relative path, in the first folder of `$ADAPRUNER_DATA` that has it, or of an absolute
    path; None if there is none."""
    folders = [folder for folder in os.environ.get("ADAPRUNER_DATA", "").split(os.pathsep) if folder]
    paths = [Path(name)] if Path(name).is_absolute() else [Path(folder, name) for folder in folders]
    return next((path for path in paths if path.exists()), None)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, with which a few lines can expand to more than fits into memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias (*name): write out what it stands for")
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """The content of YAML."""
    try:
        return yaml.load(text, _PlainLoader)
    # Values of explicit types (`!!timestamp x`) and endless nesting raise nearly every class.
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(reason(error)) from error


def parse_options(text: str) -> dict[str, Any]:
    """Options and their values in YAML."""
    options = parse_yaml(text)
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError("it is not a mapping of options to values")
    return options
