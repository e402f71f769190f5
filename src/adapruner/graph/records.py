"""Records of artifacts: the inputs that each was made from, and its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from adapruner.config import PruneConfig

T = TypeVar("T")

# A model card is for people to edit, and follows when all is measured.
CARD = "README.md"
# Larger files are told apart by their size and, where they have one, their header.
_HASHED_WHOLE = 1 << 22


@dataclass(frozen=True)
class Form(Generic[T]):
    """The form of a kept value: `save` writes it to a path that does not exist, `load` reads what `save` wrote."""

    save: Callable[[T, Path], Any]
    load: Callable[[Path], T]


class Record(BaseModel, extra="forbid", frozen=True):
    """The inputs of an artifact. It is written last: an artifact that has a record with files is complete.

    Attributes:
        name: its path in the run folder.
        version: of its form.
        options: by name, as JSON.
        leaves: the content of what is from outside, by name.
        inputs: the keys of the artifacts that it was made from, by path.
        files: what tells that each file is still as it was written, by its path in the run folder; None while the
            artifact is being made.
    """

    name: str
    version: int
    options: dict[str, Any]
    leaves: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, str] | None = None

    def has_options_of(self, config: PruneConfig) -> bool:
        """True if it was made with the options of a config."""
        values = config.model_dump(mode="json")
        # One of another version may have had others.
        return all(
            hasattr(config, name) and value == values.get(name, getattr(config, name))
            for name, value in self.options.items()
        )

    @property
    def key(self) -> str:
        """SHA-256 over all that the artifact depends on."""
        return hashlib.sha256(json.dumps(self.model_dump(exclude={"files"}), sort_keys=True).encode()).hexdigest()

    def changes(self, now: Record) -> list[str]:
        """The options and leaves that have changed, with both values where these say something."""
        changed = changes_of_options(self.options, now.options)
        for name, leaf in now.leaves.items():
            if name in self.leaves:
                changed += _changes_of_leaf(name.replace("_", " "), self.leaves[name], leaf)
        return changed or ([f"format {self.version} → {now.version}"] if self.version != now.version else [])


def changes_of_options(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The options that have another value now, with both."""
    changed = {name: (then.get(name), value) for name, value in now.items() if then.get(name) != value}
    return [f"{name} {_short(before)} → {_short(after)}" for name, (before, after) in changed.items()]


def _changes_of_leaf(name: str, then: Any, now: Any) -> list[str]:
    if then == now:
        return []
    before, after = (leaf.get("text") if isinstance(leaf, dict) and "content" in leaf else None for leaf in (then, now))
    if before or after:
        return [f"another content of {after}" if before == after else f"{name} {before or 'none'} → {after or 'none'}"]
    if isinstance(then, dict) and isinstance(now, dict):
        return [change for part in now for change in _changes_of_leaf(part, then.get(part), now[part])]
    return [f"another {name}"]


def at_hand(now: Any, then: Any) -> Any:
    """A leaf; of a text that is not at hand, what it was when the artifact was made."""
    if not isinstance(now, dict) or not isinstance(then, dict):
        return now
    if "content" in now:
        return then if now["content"] is None and now["text"] == then.get("text") else now
    return {name: at_hand(one, then.get(name)) for name, one in now.items()}


def stamps(paths: Iterable[Path], folder: Path) -> dict[str, str]:
    """A stamp of the content of each file, by its path in a folder."""
    return {path.relative_to(folder).as_posix(): _stamp(path) for path in sorted(paths)}


def are_as_written(files: dict[str, str], folder: Path) -> bool:
    """True if all files exist and are as they were written."""
    try:
        return all(_stamp(folder / name) == stamp for name, stamp in files.items())
    except (OSError, SafetensorError):
        return False


def _stamp(path: Path) -> str:
    """The SHA-256 of a small file; the size of a large one, and the SHA-256 of the header if it is a safetensors file,
    whose header says where every tensor ends: reading a model of 14 GB at every call would take minutes. Of a model
    card, only that it is there."""
    size = path.stat().st_size
    if path.name == CARD:
        return "any"
    if size <= _HASHED_WHOLE:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix != ".safetensors":
        return f"{size} bytes"
    with safe_open(path, "pt"), path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    return f"{size} bytes, {hashlib.sha256(header).hexdigest()}"


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        return _short(value[0])
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
