"""Makes what is missing of a run: values of nodes, their keys, and what of them is in the folder."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapruner.errors import AdaPrunerError
from adapruner.files import replace, saying_what_cannot_be_written
from adapruner.graph.declaring import LATER, OF_KEPT, Graph, InMemory, Kept, Leaf, Node
from adapruner.graph.folder import RunFolder
from adapruner.graph.records import Record, at_hand, changes_of_options
from adapruner.progress import Reporter

T = TypeVar("T")


@dataclass
class Making:
    """A run of a graph with one config.

    Attributes:
        graph: the nodes.
        options: the values of the options by name.
        as_json: the same as records hold them.
        given: what nodes may name beside the options; see `Graph`.
        root: the run folder, which holds what does not depend on the options that vary.
        folder: of this run; another one than `root` where several runs share that.
        reporter: shows stages and notes.
        others: run folders to take artifacts with the same key from.
        taken: by path, an artifact that is not made here but taken from another run, whatever it was made from.
        shared: the values that runs with the same `root` have in common.
        varying: the options in which these runs differ.
    """

    graph: Graph
    options: Mapping[str, Any]
    as_json: Mapping[str, Any]
    given: Mapping[str, Any]
    root: RunFolder
    folder: RunFolder
    reporter: Reporter
    others: Sequence[RunFolder] = ()
    taken: Mapping[str, RunFolder] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    varying: tuple[str, ...] = ("ratio",)
    _values: dict[str, Any] = field(default_factory=dict, init=False)
    _records: dict[str, Record] = field(default_factory=dict, init=False)

    @property
    def wanted(self) -> list[Kept[Any]]:
        """The nodes that a run with these options keeps, each after its inputs."""
        return [node for node in self.graph.kept_nodes if self.is_wanted(node)]

    def is_wanted(self, node: Kept[Any]) -> bool:
        """True if a run with these options keeps the node."""
        names = inspect.signature(node.is_wanted).parameters
        return bool(node.is_wanted(**{name: self.options[name] for name in names}))

    def value(self, node: Node[T] | str) -> Any:
        """The value of an option, of something given, or of a node: loaded, remembered, or made now.

        Raises:
            LookupError: it is kept, and not made yet.
        """
        name = node if isinstance(node, str) else node.name
        if name in self.given:
            return self.given[name]
        if name in self.options:
            return self.options[name]
        found = self.graph.nodes[name]
        if isinstance(found, Kept) and not self.is_wanted(found):
            return None
        values = self._values if self.graph.depends_on(name, self.varying) else self.shared
        if name in values:
            return values[name]
        if isinstance(found, Kept) and (place := self._place_of(found)):
            values[name] = found.form.load(place / found.path)
        elif isinstance(found, Kept) and not found.is_early:
            raise LookupError(f"{found.path} is not made yet")
        else:
            values[name] = self._called(found)
        return values[name]

    def record(self, node: Kept[Any]) -> Record:
        """The inputs of a kept node with these options; their key is the key of the node."""
        if node.name not in self._records:
            reach, then = self.graph.reach(node.name), self.folder_of(node).record(node.path)
            inputs = [self.graph.nodes[name] for name in sorted(reach.kept)]
            record = Record(
                name=node.path,
                version=node.version,
                options={name: self.as_json[name] for name in sorted(reach.options)},
                leaves={
                    leaf.title: at_hand(leaf.content(self.value(leaf)), then and then.leaves.get(leaf.title))
                    for leaf in map(self.graph.nodes.get, sorted(reach.leaves))
                    if isinstance(leaf, Leaf)
                },
                inputs={
                    other.path: self.record(other).key
                    for other in inputs
                    if isinstance(other, Kept) and self.is_wanted(other)
                },
            )
            if node.path in self.taken:
                source = self.taken[node.path].record(node.path)
                leaves = source.leaves | {"taken": source.key} if source else {}
                record = Record(name=node.path, version=node.version, options={}, leaves=leaves, inputs={})
            self._records[node.name] = record
        return self._records[node.name]

    def folder_of(self, node: Kept[Any]) -> RunFolder:
        """The folder in which a kept node is."""
        return self.folder if self.graph.depends_on(node.name, self.varying) else self.root

    def is_made(self, node: Kept[Any]) -> bool:
        """True if it is in its folder, or can be taken over from another one."""
        return self._place_of(node) is not None

    def _place_of(self, node: Kept[Any]) -> Path | None:
        key = self.record(node).key
        for folder in (self.folder_of(node), *self.others):
            if folder.is_made(node.path, key):
                return folder.path
        source = self.taken.get(node.path)
        return source.path if source else None

    def missing(self) -> list[Kept[Any]]:
        """The nodes that are to be made: missing results, damaged artifacts, and their inputs."""
        needed: set[str] = set()
        missing = []
        for node in reversed(self.wanted):
            if (node.is_result or node.name in needed or self.is_damaged(node)) and not self.is_made(node):
                missing.append(node)
                needed |= self.graph.reach(node.name).kept
        return missing[::-1]

    def is_damaged(self, node: Kept[Any]) -> bool:
        """True if some files of a finished artifact are not as they were written; removed ones do not count."""
        folder, key = self.folder_of(node), self.record(node).key
        then = folder.record(node.path)
        was_made = then is not None and then.key == key and then.files is not None
        return was_made and not folder.is_removed(node.path) and not folder.is_made(node.path, key)

    def is_outdated(self, node: Kept[Any]) -> bool:
        """True if it exists, finished or begun, and was made from other inputs."""
        then = self.folder_of(node).record(node.path)
        return then is not None and then.key != self.record(node).key

    def outdated(self) -> dict[str, list[str]]:
        """The existing artifacts, finished or begun, that were made from other inputs; by path, with what changed."""
        outdated = {}
        for node in self.wanted:
            then, now = self.folder_of(node).record(node.path), self.record(node)
            if then is not None and then.key != now.key:
                outdated[node.path] = then.changes(now)
                for path in then.inputs.keys() - now.inputs.keys():
                    dropped = self.folder.record(path) or self.root.record(path)
                    options = dropped.options if dropped else {}
                    now_dropped = {name: self.as_json[name] for name in options if name in self.as_json}
                    outdated[node.path] += changes_of_options(options, now_dropped) or [f"no {path}"]
                outdated[node.path] += [f"also {path}" for path in now.inputs.keys() - then.inputs.keys()]
        return outdated

    def prepare(self, nodes: Iterable[Kept[Any]]) -> None:
        """Makes what these are made from, as far as it costs little and needs nothing that is not made yet.

        Raises:
            AdaPrunerError: some of it is impossible.
        """
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

    def take_over(self) -> None:
        """Copies what other run folders hold of this run."""
        for node in self.wanted:
            folder, record = self.folder_of(node), self.record(node)
            if folder.is_made(node.path, record.key):
                continue
            if source := self.taken.get(node.path):
                folder.take_over(node.path, source, record)
            elif source := next((other for other in self.others if other.is_made(node.path, record.key)), None):
                folder.take_over(node.path, source)

    def make(self, node: Kept[Any]) -> None:
        """Makes and saves what a node stands for."""
        folder, record = self.folder_of(node), self.record(node)
        folder.begin(node.path, record)
        if node.is_early:
            value = self.value(node)
        else:
            # Artifacts that are alike are named after what they are about, such as perplexity-dense: a line says it.
            subject = Path(node.path).stem.partition("-")[2].replace("_", " ")
            with self.reporter.making(record.key, subject):
                value = self._called(node, work=folder.work(node.path, record.key), key=record.key)
        self._save(node, value)

    def _called(self, node: Node[T], **of_kept: Any) -> T:
        values, before = dict[str, Any](), self._values.keys() | self.shared.keys()
        for parameter, name in node.needs.items():
            is_later = parameter.endswith(LATER)
            values[parameter] = of_kept.get(name) or (partial(self.value, name) if is_later else self.value(name))
        made = node.make(**values)
        if isinstance(node, InMemory):  # in a resumed run, nothing else may need what it was made from
            for parameter, name in node.needs.items():
                if name not in before and values[parameter] is not made and self._is_read_again(name):
                    self._values.pop(name, None)
                    self.shared.pop(name, None)
        return made

    def _save(self, node: Kept[Any], value: Any) -> None:
        folder = self.folder_of(node)
        path = folder.path / node.path
        partial_path = path.with_name(f".{path.name}.partial")
        with saying_what_cannot_be_written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial_path, ignore_errors=True)
            node.form.save(value, partial_path)
            replace(partial_path, path)
        folder.finish(node.path, self.record(node), node.beside)

    def forget_but(self, remaining: Sequence[str]) -> None:
        """Drops values that were loaded or are costly if no remaining node needs them. A value that is rebuilt at no
        cost is only kept for the next of them.

        Args:
            remaining: the names of the nodes that are to be made, in this order.
        """
        values = {**self._values, **self.shared}
        needed = [self.graph.held_for(name, values) for name in remaining]
        later, next_needs = frozenset[str]().union(*needed), needed[0] if needed else frozenset[str]()
        held = {
            id(values[name]) for name in later & values.keys() if name in next_needs or not self._is_read_again(name)
        }
        for name in values:
            node = self.graph.nodes[name]
            is_held = name in later and (name in next_needs or id(values[name]) in held)
            if not is_held and (isinstance(node, Kept) or (isinstance(node, InMemory) and node.is_costly)):
                self._values.pop(name, None)
                self.shared.pop(name, None)

    def _is_read_again(self, name: str) -> bool:
        node = self.graph.nodes.get(name)
        return isinstance(node, InMemory) and node.is_read_again_if is not None and self.value(node.is_read_again_if)

    def keys(self) -> list[str]:
        """The keys of all that the run keeps."""
        return [self.record(node).key for node in self.wanted]


def make_all(makings: Sequence[Making]) -> None:
    """Makes what is missing of runs that share a folder, one run after the other."""
    later = [[node.name for node in making.missing()] for making in makings]
    for number, making in enumerate(makings):
        making.take_over()
        for node in making.wanted:
            if not node.is_page and making.is_damaged(node):
                place = making.folder_of(node).path / node.path
                making.reporter.note(f"{place} was changed or damaged since it was written: rebuilding it")
        while missing := making.missing():
            making.make(missing[0])
            remaining = [
                *(node.name for node in missing[1:]),
                *(name for names in later[number + 1 :] for name in names),
            ]
            making.forget_but(remaining)
        for folder in (making.root, making.folder):
            folder.remove_unfinished()
    # What an interrupted run with other options made, if these results do not need it any more.
    outdated = [(each.folder_of(node), node) for each in makings for node in each.wanted if each.is_outdated(node)]
    for folder, node in _left_over(makings) + outdated:
        folder.remove(node.path)


def refuse_outdated(makings: Sequence[Making], path: Path) -> None:
    """Refuses to replace or remove what was made with other options, from another model or other text.

    Raises:
        AdaPrunerError: with what changed and what would be rebuilt or removed.
    """
    rebuilt, removed = dict[str, list[str]](), dict[str, list[str]]()
    for making in makings:
        for name, changes in making.outdated().items():
            rebuilt.setdefault(name, []).extend(changes)
    keys = set[str]().union(*(making.keys() for making in makings))
    for folder, node in _left_over(makings):
        then = folder.record(node.path)
        if then is None or then.key not in keys:
            changes = [f"no {node.path}"]
            if then and makings[0].is_wanted(node):
                changes = then.changes(makings[0].record(node))
            removed.setdefault(str((folder.path / node.path).relative_to(path)), []).extend(changes)
    # What is made from outdated artifacts has no change of its own.
    all_changes = (change for changes in (rebuilt | removed).values() for change in changes)
    if changes := list(dict.fromkeys(all_changes)):
        ends = ((rebuilt, "rebuilt"), (removed, "removed"))
        losses = " and ".join(f"{', '.join(names)} would be {end}" for names, end in ends if names)
        raise AdaPrunerError(
            f"{path} holds a run of another configuration ({', '.join(changes)}): {losses}. Choose another `output`, or"
            " allow it with `overwrite`"
        )


def _left_over(makings: Sequence[Making]) -> list[tuple[RunFolder, Kept[Any]]]:
    """The artifacts of other values of the options that vary, with their folders: of a ratio that the makings do not
    have, or of one that has another folder where there are several. In the folder of a ratio, also those whose record
    is damaged."""
    making, used = makings[0], {making.folder.path for making in makings}
    return [
        (folder, node)
        for folder in making.root.with_ratios
        if folder.path not in used
        for node in making.graph.kept_nodes
        if making.graph.depends_on(node.name, making.varying)
        and (folder.record(node.path) or (folder.path != making.root.path and (folder.path / node.path).exists()))
    ]
