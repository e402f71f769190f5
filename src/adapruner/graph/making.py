"""Makes what is missing of a run: values of nodes, their keys, and what of them is in the folder."""

import inspect
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import replace, report_write_errors
from adapruner.base.progress import Reporter
from adapruner.graph.folder import Folder
from adapruner.graph.nodes import (
    LATER,
    OF_KEPT,
    Graph,
    InMemory,
    Kept,
    Leaf,
    Node,
    Record,
    changes_of_options,
    leaf_or_recorded,
)

T = TypeVar("T")


@dataclass
class Making:
    """A run of a graph with one config.

    Attributes:
        graph: the nodes.
        options: the values of the options by name.
        as_json: the same as records hold them.
        given: what nodes may name beside the options; see `Graph`.
        folder: the run folder.
        reporter: shows stages and notes.
        others: run folders to take artifacts with the same key from.
        taken: by path, the record of an artifact of one of these folders that counts, whatever it was made from.
        values: of nodes, by name; what is in it at first is not made.
    """

    graph: Graph
    options: Mapping[str, Any]
    as_json: Mapping[str, object]
    given: Mapping[str, Any]
    folder: Folder
    reporter: Reporter
    others: Sequence[Folder] = ()
    taken: Mapping[str, Record] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)
    _records: dict[str, Record] = field(default_factory=dict, init=False)

    @property
    def wanted(self) -> list[Kept[object]]:
        """The nodes that a run with these options keeps, each after its inputs."""
        return [node for node in self.graph.kept_nodes if self.is_wanted(node)]

    def is_wanted(self, node: Kept[object]) -> bool:
        """True if a run with these options keeps the node."""
        names = inspect.signature(node.is_wanted).parameters
        return bool(node.is_wanted(**{name: self.options[name] for name in names}))

    @overload
    def value(self, node: Node[T]) -> T: ...

    @overload
    def value(self, node: str) -> Any: ...

    def value(self, node: Node[Any] | str) -> Any:
        """The value of a node: loaded, remembered, or made now; by its name also that of an option, or of something
        given. None for a kept node that a run with these options does not have."""
        name = node if isinstance(node, str) else node.name
        if name in self.given:
            return self.given[name]
        if name in self.options:
            return self.options[name]
        found = self.graph.nodes[name]
        if isinstance(found, Kept) and not self.is_wanted(found):
            return None
        if name in self.values:
            return self.values[name]
        if isinstance(found, Kept) and (holder := self._holder_of(found)):
            self.values[name] = found.form.load(holder.place(found.path))
        elif isinstance(found, Kept) and not found.is_early:
            raise LookupError(f"{found.path} is not made yet")
        else:
            self.values[name] = self._called(found)
        return self.values[name]

    def record(self, node: Kept[Any]) -> Record:
        """The inputs of a kept node with these options; their key is the key of the node."""
        if taken := self.taken.get(node.path):
            return taken
        if node.name not in self._records:
            of_key, then = self.graph.inputs_of_key(node.name), self.folder.record(node.path)
            leaves, inputs = (
                [self.graph.nodes[name] for name in sorted(names)] for names in (of_key.leaves, of_key.kept)
            )
            self._records[node.name] = Record(
                name=node.path,
                version=node.version,
                options={name: self.as_json[name] for name in sorted(of_key.options)},
                leaves={
                    leaf.title: leaf_or_recorded(leaf.content(self.value(leaf)), then and then.leaves.get(leaf.title))
                    for leaf in leaves
                    if isinstance(leaf, Leaf)
                },
                inputs={
                    node.path: self.record(node).key
                    for node in inputs
                    if isinstance(node, Kept) and self.is_wanted(node)
                },
            )
        return self._records[node.name]

    def _holder_of(self, node: Kept[object]) -> Folder | None:
        """The folder that has it: this one, or one that it can be taken over from."""
        key, others = self.record(node).key, () if node.names_folder else self.others
        return next((folder for folder in (self.folder, *others) if folder.is_made(node.path, key)), None)

    def missing(self) -> list[Kept[object]]:
        """The nodes that are to be made: missing results, damaged artifacts, and their inputs."""
        needed: set[str] = set()
        missing = []
        for node in reversed(self.wanted):
            is_needed = node.is_result or node.name in needed
            if (is_needed or self.folder.is_damaged(node.path, self.record(node).key)) and not self._holder_of(node):
                missing.append(node)
                needed |= self.graph.inputs_of_key(node.name).kept
        return missing[::-1]

    def outdated(self) -> dict[str, list[str]]:
        """The existing artifacts, finished or begun, that were made from other inputs; by path, with what changed."""
        outdated = {}
        for node in self.wanted:
            then, now = self.folder.record(node.path), self.record(node)
            if then is not None and then.key != now.key:
                outdated[node.path] = then.changes(now)
                for path in then.inputs.keys() - now.inputs.keys():
                    dropped = self.folder.record(path)
                    options = dropped.options if dropped else {}
                    now_dropped = {name: self.as_json[name] for name in options if name in self.as_json}
                    outdated[node.path] += changes_of_options(options, now_dropped) or [f"no {path}"]
                outdated[node.path] += [f"also {path}" for path in now.inputs.keys() - then.inputs.keys()]
        return outdated

    def prepare(self, nodes: Iterable[Kept[object]]) -> None:
        """Makes what these are made from, as far as it costs little and needs nothing that is not made yet."""
        is_at_hand: dict[str, bool] = {}

        def prepared(name: str) -> bool:
            node = self.graph.nodes.get(name)
            if name in is_at_hand or node is None:
                return is_at_hand.get(name, name not in OF_KEPT)
            if isinstance(node, Kept):
                is_at_hand[name] = node.is_early or not self.is_wanted(node)
            else:
                needed = [prepared(each) for parameter, each in node.needs.items() if not parameter.endswith(LATER)]
                is_at_hand[name] = all(needed) and not (isinstance(node, InMemory) and node.is_costly)
            if is_at_hand[name]:
                self.value(name)
            return is_at_hand[name]

        for node in nodes:
            for parameter, name in node.needs.items():
                if not parameter.endswith(LATER):
                    prepared(name)

    def make(self, node: Kept[object]) -> None:
        """Makes and saves what a node stands for."""
        record = self.record(node)
        work = self.folder.begin(node.path, record)
        # Artifacts that are alike are named after what they are about, such as perplexity-dense: a line says it.
        subject = Path(node.path).stem.partition("-")[2].replace("_", " ")
        with self.reporter.making(record.key, subject):
            value = self.value(node) if node.is_early else self._called(node, work=work, key=record.key)
        path = self.folder.place(node.path)
        partial_path = path.with_name(f".{path.name}.partial")
        with report_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial_path, ignore_errors=True)
            node.form.save(value, partial_path)
            replace(partial_path, path)
        self.folder.finish(node.path, record, node.beside)

    def take_part(self, node: Kept[T]) -> T:
        """Runs a node as one of several processes that make it together, of which another one keeps the value."""
        key = self.record(node).key
        return self._called(node, work=self.folder.work(node.path, key), key=key)

    def _called(self, node: Node[T], **of_kept: object) -> T:
        values, before = dict[str, object](), set(self.values)
        for parameter, name in node.needs.items():
            is_later = parameter.endswith(LATER)
            values[parameter] = of_kept.get(name) or (partial(self.value, name) if is_later else self.value(name))
        made = node.make(**values)
        if isinstance(node, InMemory):  # in a resumed run, nothing else may need what it was made from
            for parameter, name in node.needs.items():
                if name not in before and values[parameter] is not made and self._is_read_again(name):
                    self.values.pop(name, None)
        return made

    def release_unneeded(self, remaining: Sequence[str]) -> None:
        """Drops values that were loaded or are costly if no remaining node needs them. A value that is rebuilt at no
        cost is only kept for the next of them.

        Args:
            remaining: the names of the nodes that are to be made, in this order.
        """
        values = self.values
        needed = [self.graph.held_for(name, values) for name in remaining]
        later, next_needs = frozenset[str]().union(*needed), needed[0] if needed else frozenset[str]()
        held = {
            id(values[name]) for name in later & values.keys() if name in next_needs or not self._is_read_again(name)
        }
        for name in list(values):
            node = self.graph.nodes[name]
            is_held = name in later and (name in next_needs or id(values[name]) in held)
            if not is_held and (isinstance(node, Kept) or (isinstance(node, InMemory) and node.is_costly)):
                del values[name]

    def _is_read_again(self, name: str) -> bool:
        node = self.graph.nodes.get(name)
        return isinstance(node, InMemory) and node.is_read_again_if is not None and self.value(node.is_read_again_if)

    def make_missing(self) -> None:
        """Makes what is missing, after what other run folders hold of it is copied."""
        for node in self.wanted:
            if (holder := self._holder_of(node)) and holder is not self.folder:
                self.folder.take_over(node.path, holder)
        for node in self.wanted:
            if self.folder.is_damaged(node.path, self.record(node).key):
                self.reporter.note(
                    f"{self.folder.place(node.path)} was changed or damaged since it was written: rebuilding it"
                )
        while missing := self.missing():
            self.make(missing[0])
            self.release_unneeded([node.name for node in missing[1:]])
        shutil.rmtree(self.folder.unfinished, ignore_errors=True)
        # What an interrupted run with other options made, if these results do not need it any more.
        for name in self.outdated():
            self.folder.remove(name)

    def refuse_outdated(self) -> None:
        """Refuses to replace what was made with other options, from another model or other text."""
        rebuilt = self.outdated()
        # What is made from outdated artifacts has no change of its own.
        if changes := list(dict.fromkeys(change for changes in rebuilt.values() for change in changes)):
            raise AdaPrunerError(
                f"{self.folder.shown} holds {self.folder.noun} of another configuration ({', '.join(changes)}):"
                f" {', '.join(rebuilt)} would be rebuilt. Choose another `output`, or allow it with `overwrite`"
            )
