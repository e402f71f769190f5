"""Nodes and the graph that they make: the parameters of a function are what it depends on; records of what was made."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

T = TypeVar("T")


@dataclass(frozen=True)
class Form(Generic[T]):
    """The form of a kept value: `save` writes it to a path that does not exist, `load` reads what `save` wrote."""

    save: Callable[[T, Path], object]
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
    options: dict[str, object]
    leaves: dict[str, object]
    inputs: dict[str, str]
    files: dict[str, str] | None = None

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


def changes_of_options(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """The options that have another value now, with both."""
    changed = {name: (then.get(name), value) for name, value in now.items() if then.get(name) != value}
    return [f"{name} {_short(before)} → {_short(after)}" for name, (before, after) in changed.items()]


def _changes_of_leaf(name: str, then: object, now: object) -> list[str]:
    if then == now:
        return []
    before, after = (leaf.get("text") if isinstance(leaf, dict) and "content" in leaf else None for leaf in (then, now))
    if before or after:
        return [f"another content of {after}" if before == after else f"{name} {before or 'none'} → {after or 'none'}"]
    if isinstance(then, dict) and isinstance(now, dict):
        plain = {part for part in now if not isinstance(now[part], dict | list)}
        changes = changes_of_options(then, {part: now[part] for part in plain})
        return changes + [
            c for part in now if part not in plain for c in _changes_of_leaf(part, then.get(part), now[part])
        ]
    return [f"another {name}"]


def leaf_or_recorded(now: object, then: object) -> object:
    """A leaf; of a text that is not at hand, what it was when the artifact was made."""
    if not isinstance(now, dict) or not isinstance(then, dict):
        return now
    if "content" in now:
        return then if now["content"] is None and now["text"] == then.get("text") else now
    return {name: leaf_or_recorded(part, then.get(name)) for name, part in now.items()}


def _short(value: object) -> str:
    if isinstance(value, list) and len(value) == 1:
        return _short(value[0])
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


N = TypeVar("N", bound="Node[Any]")

# A parameter with this ending is a function that gives what the rest of its name stands for, when it is needed.
LATER = "_later"
# What every kept node may be handed beside its dependencies: a folder of its own, in which a killed process leaves
# what it can be resumed from, and its key.
OF_KEPT = ("work", "key")


class GraphError(Exception):
    """A declaration that makes no graph; raised when its module is imported."""


@dataclass(frozen=True, eq=False)
class Node(Generic[T]):
    """A function that is called with the values of what it names.

    Attributes:
        name: as other nodes name it.
        make: the function.
        needs: by parameter, the name of an option, of something given, or of another node.
    """

    name: str
    make: Callable[..., T]
    needs: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class InMemory(Node[T]):
    """A value that is made when it is needed and never saved. Whoever names it depends on all that it depends on.

    Attributes:
        is_costly: it is not made to find mistakes before the work begins, and is dropped once nothing needs it.
        is_read_again_if: names a value that says whether it is rebuilt at no cost, such as a model that is mapped
            from files: then it is dropped as soon as the next node does not need it.
    """

    is_costly: bool = False
    is_read_again_if: str | None = None


@dataclass(frozen=True, eq=False)
class Leaf(Node[T]):
    """A value from outside, such as a file: whoever names it depends on its content, and on nothing else of it.

    Attributes:
        content: the content of the value, as JSON; None decides no number.
        title: what people call it.
    """

    content: Callable[[T], object] = lambda value: None
    title: str = ""


@dataclass(frozen=True, eq=False)
class Kept(Node[T]):
    """A value that is saved in the run folder under a key.

    Attributes:
        path: its path in the run folder.
        form: how it is saved and loaded.
        version: of the form; a value of another version is rebuilt.
        is_wanted: given options by name, whether a run with them has it; where it has not, the value is None.
        is_early: made as soon as its value is needed, like a value in memory, and saved when the work begins: for what
            costs little but is made from something that may be gone later.
        is_result: rebuilt when its files were removed; others are rebuilt when something needs them.
        beside: further files that it writes, for people to edit: it is rebuilt when one was removed.
        names_folder: its content names the run folder: it is not taken over from another one.
    """

    path: str = field(kw_only=True)
    form: Form[T] = field(kw_only=True)
    version: int = 1
    is_wanted: Callable[..., object] = lambda: True
    is_early: bool = False
    is_result: bool = False
    beside: tuple[str, ...] = ()
    names_folder: bool = False


@dataclass(frozen=True)
class KeyInputs:
    """The names of the options, leaves and kept nodes of which the key of a node is made."""

    options: frozenset[str]
    leaves: frozenset[str]
    kept: frozenset[str]


class Graph:
    """Nodes, each declared after all that it needs.

    Args:
        options: the class of the config, whose fields are the options.
        given: the names of what a run hands to its nodes beside the options: it decides no number.
        unkeyed: those of them that would: only leaves may name them, and kept nodes that are declared `is_record`.

    Example:
        >>> from pydantic import BaseModel
        >>> class Options(BaseModel):
        ...     size: int = 3
        >>> graph = Graph(Options)
        >>> @graph.in_memory
        ... def numbers(size):
        ...     return list(range(size))
        >>> @graph.in_memory
        ... def total(numbers):
        ...     return sum(numbers)
        >>> sorted(graph.inputs_of_key("total").options)
        ['size']
    """

    def __init__(self, options: type[BaseModel], given: Collection[str] = (), unkeyed: Collection[str] = ()) -> None:
        self._class = options
        self.options = frozenset(options.model_fields)
        self.given, self.unkeyed = frozenset(given) | frozenset(unkeyed), frozenset(unkeyed)
        self.nodes: dict[str, Node[object]] = {}
        self._inputs: dict[str, KeyInputs] = {}

    def in_memory(self, make: Callable[..., T]) -> InMemory[T]:
        """Declares a node in memory; see `InMemory`."""
        return self._add(InMemory(*_named(make)))

    def costly(self, make: Callable[..., T], is_read_again_if: str | None = None) -> InMemory[T]:
        """Declares a node in memory that takes long or much memory, such as a loaded model."""
        return self._add(InMemory(*_named(make), is_costly=True, is_read_again_if=is_read_again_if))

    def leaf(
        self, content: Callable[[Any], Any] = lambda value: None, title: str | None = None
    ) -> Callable[[Callable[..., T]], Leaf[T]]:
        """Declares a leaf; see `Leaf`.

        Args:
            title: by default the name of the function.
        """
        return lambda make: self._add(Leaf(*_named(make), content=content, title=title or make.__name__))

    def kept(
        self,
        path: str,
        form: Form[Any],
        *,
        is_record: bool = False,
        name: str | None = None,
        needs: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> Callable[[Callable[..., T]], Kept[T]]:
        """Declares a kept node; see `Kept`.

        Args:
            is_record: it holds what the run was, whatever its options: it may name what is `unkeyed`.
            name: by default that of the function.
            needs: by parameter, what it needs; by default what has the name of the parameter.
        """

        def declare(make: Callable[..., T]) -> Kept[T]:
            node = Kept(*_named(make, name, needs), path=path, form=form, **fields)
            for option in inspect.signature(node.is_wanted).parameters:
                if option not in self.options:
                    raise GraphError(f"whether {node.name} is wanted depends on {option}, which is no option")
            return self._add(node, is_record)

        return declare

    def _add(self, node: N, is_record: bool = False) -> N:
        if node.name in self.nodes or node.name in self.options or node.name in self.given:
            raise GraphError(f"{node.name} stands for something else already")
        is_kept, is_keyed = isinstance(node, Kept), not (is_record or isinstance(node, Leaf))
        may_name = self.options | self.given | self.nodes.keys() | (set(OF_KEPT) if is_kept else set())
        for needed in node.needs.values():
            if needed not in may_name:
                raise GraphError(
                    f"{node.name} names {needed}: no option, nothing that is given, no node declared before it"
                )
            if is_keyed and needed in self.unkeyed:
                raise GraphError(f"{node.name} names {needed}, of which its key would not depend")
        code: Any = getattr(node.make, "__code__", None)
        if code and is_keyed and any(node.make.__globals__.get(name) is self._class for name in code.co_names):
            raise GraphError(f"{node.name} reads {self._class.__name__}: it must name the options that it depends on")
        self.nodes[node.name] = node
        options, leaves, kept = set[str](), set[str](), set[str]()
        for needed in node.needs.values():
            other = self.nodes.get(needed)
            if needed in self.options:
                options.add(needed)
            elif isinstance(other, Kept):
                kept.add(needed)
            elif isinstance(other, Leaf):
                leaves.add(needed)
            elif other:
                below = self._inputs[needed]
                options, leaves, kept = options | below.options, leaves | below.leaves, kept | below.kept
        self._inputs[node.name] = KeyInputs(frozenset(options), frozenset(leaves), frozenset(kept))
        return node

    def check(self) -> None:
        """Refuses nodes that nothing needs."""
        needed = {name for node in self.nodes.values() for name in node.needs.values()}
        needed |= {node.is_read_again_if or "" for node in self.nodes.values() if isinstance(node, InMemory)}
        needed |= {name for name, node in self.nodes.items() if isinstance(node, Kept) and node.is_result}
        unused = [name for name in self.nodes if name not in needed]
        if unused:
            raise GraphError(f"nothing needs {', '.join(unused)}")

    def inputs_of_key(self, name: str) -> KeyInputs:
        """The names of all that the key of a node is made of."""
        return self._inputs[name]

    @cached_property
    def kept_nodes(self) -> tuple[Kept[object], ...]:
        """All that is kept, each after what it needs."""
        return tuple(node for node in self.nodes.values() if isinstance(node, Kept))

    def held_for(self, name: str, at_hand: Container[str] = ()) -> frozenset[str]:
        """The names of all that a node needs in memory, up to what is kept or at hand."""
        node = self.nodes.get(name)
        needed = () if node is None else node.needs.values()
        below = [
            self.held_for(each, at_hand)
            for parameter, each in (node.needs if node else {}).items()
            if each not in at_hand and not parameter.endswith(LATER) and not isinstance(self.nodes.get(each), Kept)
        ]
        return frozenset(needed).union(*below)


def _named(
    make: Callable[..., T], name: str | None = None, needs: Mapping[str, str] | None = None
) -> tuple[str, Callable[..., T], dict[str, str]]:
    parameters = inspect.signature(make).parameters
    named = {parameter: (needs or {}).get(parameter, parameter) for parameter in parameters}
    return name or make.__name__, make, {parameter: needed.removesuffix(LATER) for parameter, needed in named.items()}
