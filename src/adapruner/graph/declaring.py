"""Nodes and the graph that they make: the parameters of a function are what it depends on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

from adapruner.graph.records import Form

T = TypeVar("T")
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

    content: Callable[[T], Any] = lambda value: None
    title: str = ""


@dataclass(frozen=True, eq=False)
class Kept(Node[T]):
    """A value that is saved in the run folder under a key.

    Attributes:
        path: its path in the run folder.
        form: how it is saved and loaded.
        version: of the form; a value of another version is rebuilt.
        is_wanted: given options by name, whether a run with them has it; where it has not, the value is None.
        is_result: rebuilt when its files were removed; others are rebuilt when something needs them.
        is_step: its files are removed once the run is finished; they are rebuilt when something needs them.
        is_page: other commands write it too; that it has changed is no damage.
        beside: further files that it writes, for people to edit: it is rebuilt when one was removed.
    """

    path: str = field(kw_only=True)
    form: Form[T] = field(kw_only=True)
    version: int = 1
    is_wanted: Callable[..., Any] = lambda: True
    is_result: bool = False
    is_step: bool = False
    is_page: bool = False
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reach:
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
        >>> sorted(graph.reach("total").options)
        ['size']
    """

    def __init__(self, options: Any, given: Collection[str] = (), unkeyed: Collection[str] = ()) -> None:
        self._class = options
        self.options = frozenset(options.model_fields)
        self.given, self.unkeyed = frozenset(given) | frozenset(unkeyed), frozenset(unkeyed)
        self.nodes: dict[str, Node[Any]] = {}
        self._reaches: dict[str, Reach] = {}

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
                    f"{node.name} names {needed}, which is no option, nothing that is given, and no node declared"
                    " before it"
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
                below = self._reaches[needed]
                options, leaves, kept = options | below.options, leaves | below.leaves, kept | below.kept
        self._reaches[node.name] = Reach(frozenset(options), frozenset(leaves), frozenset(kept))
        return node

    def check(self) -> None:
        """Refuses nodes that nothing needs.

        Raises:
            GraphError: with their names.
        """
        needed = {name for node in self.nodes.values() for name in node.needs.values()}
        needed |= {node.is_read_again_if or "" for node in self.nodes.values() if isinstance(node, InMemory)}
        needed |= {name for name, node in self.nodes.items() if isinstance(node, Kept) and node.is_result}
        unused = [name for name in self.nodes if name not in needed]
        if unused:
            raise GraphError(f"nothing needs {', '.join(unused)}")

    def reach(self, name: str) -> Reach:
        """The names of all that the key of a node is made of."""
        return self._reaches[name]

    @cached_property
    def kept_nodes(self) -> tuple[Kept[Any], ...]:
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
