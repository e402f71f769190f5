"""Loads the artifacts whose keys are right, and makes the others."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from adapruner.artifacts import Artifact, Record, at_hand, options_of
from adapruner.errors import AdaPrunerError, NonFiniteError
from adapruner.files import replace, saying_what_cannot_be_written
from adapruner.job import Job
from adapruner.procedure import ARTIFACTS, leave_out_broken_windows, windows
from adapruner.run import RunFolder

T = TypeVar("T")


@dataclass
class Driver:
    """The artifacts of one ratio of a run.

    Attributes:
        root: the run folder, which holds what does not depend on the ratio.
        others: run folders to take artifacts with the same key from.
    """

    job: Job
    root: RunFolder
    others: tuple[RunFolder, ...] = ()
    records: dict[str, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Reads the leaves, and derives what every wanted artifact depends on."""
        prepared = self.job.prepared
        for artifact in self.wanted:
            leaves = prepared.leaves | {"left_out": prepared.left_out(self.job.keys)}
            inputs = {one.name: self.job.keys[one.name] for one in artifact.inputs if one.name in self.job.keys}
            then = self.folder(artifact).record(artifact.name)
            record = Record(
                name=artifact.name,
                version=artifact.version,
                options=options_of(self.job.config, artifact.options),
                leaves={name: at_hand(leaves[name], then and then.leaves.get(name)) for name in artifact.leaves},
                inputs=inputs,
            )
            self.records[artifact.name], self.job.keys[artifact.name] = record, record.key

    @property
    def wanted(self) -> list[Artifact[Any]]:
        """The artifacts of a run with this config, each behind its inputs."""
        return [artifact for artifact in ARTIFACTS if artifact.is_wanted(self.job.config)]

    def folder(self, artifact: Artifact[Any]) -> RunFolder:
        """Where an artifact is kept."""
        depends_on_ratio = artifact.depends_on("ratio") or artifact.depends_on("searched_ratio")
        return self.job.folder if depends_on_ratio else self.root

    def is_made(self, artifact: Artifact[Any]) -> bool:
        """Whether an artifact is in its folder, or can be taken over from another one."""
        key = self.job.keys[artifact.name]
        return any(folder.is_made(artifact.name, key) for folder in (self.folder(artifact), *self.others))

    def take_over(self) -> None:
        """Takes what other run folders hold of this run."""
        for artifact in self.wanted:
            folder, key = self.folder(artifact), self.job.keys[artifact.name]
            if not folder.is_made(artifact.name, key):
                for other in [one for one in self.others if one.is_made(artifact.name, key)][:1]:
                    folder.take_over(artifact.name, other)

    def outdated(self) -> dict[str, list[str]]:
        """The existing artifacts, finished or begun, that were made from other inputs; by name, with what changed."""
        outdated = {}
        for artifact in self.wanted:
            then, now = self.folder(artifact).record(artifact.name), self.records[artifact.name]
            if then is not None and then.key != now.key:
                outdated[artifact.name] = then.changes(now)
        return outdated

    def missing(self) -> list[Artifact[Any]]:
        """The artifacts to make: missing results, damaged artifacts, and what these are made from."""
        needed: set[str] = set()
        missing = []
        for artifact in reversed(self.wanted):
            is_needed = artifact.is_result or artifact.name in needed or self.is_damaged(artifact)
            if is_needed and not self.is_made(artifact):
                missing.append(artifact)
                needed |= {one.name for one in artifact.inputs}
        return missing[::-1]

    def is_damaged(self, artifact: Artifact[Any]) -> bool:
        """Whether some files of a finished artifact are not as they were written; removed ones do not count."""
        folder, now = self.folder(artifact), self.records[artifact.name]
        then = folder.record(artifact.name)
        was_made = then is not None and then.key == now.key and then.files is not None
        return was_made and not folder.is_removed(artifact.name) and not folder.is_made(artifact.name, now.key)

    def make(self, artifact: Artifact[Any]) -> None:
        """Makes an artifact; of several processes, the first saves it.

        Raises:
            NonFiniteError: the loss of the dense model is not finite on some windows, which are left out from now on;
                this changes the keys of everything made from them.
        """
        process = self.job.prepared.process
        if process.leads or artifact.is_shared:
            value = self._made(artifact)
            if process.leads:
                self._keep(artifact, value)
        process.wait()

    def value(self, artifact: Artifact[T]) -> T | None:
        """An artifact that is made, loaded; None if the run does not want it."""
        if not artifact.is_wanted(self.job.config):
            return None
        return artifact.form.load(self.folder(artifact).path / artifact.name)

    def _made(self, artifact: Artifact[Any]) -> Any:
        folder, record, process = self.folder(artifact), self.records[artifact.name], self.job.prepared.process
        if process.leads:
            folder.begin(artifact.name, record)
        if artifact.is_shared:
            process.wait()
        try:
            with self.job.prepared.reporter.making(record.key):
                return artifact.make(
                    self.job, folder.work(artifact.name, record.key), *map(self.value, artifact.inputs)
                )
        except NonFiniteError as error:
            drawn = self.value(windows)
            if drawn is not None and process.count == 1:
                leave_out_broken_windows(self.job, drawn, error)
            raise

    def _keep(self, artifact: Artifact[Any], value: Any) -> None:
        folder = self.folder(artifact)
        path = folder.path / artifact.name
        partial = path.with_name(f".{path.name}.partial")
        with saying_what_cannot_be_written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            artifact.form.save(value, partial)
            replace(partial, path)
        folder.finish(artifact.name, self.records[artifact.name], artifact.beside)


def refuse_outdated(drivers: Iterable[Driver], path: Path) -> None:
    """Refuses to replace what was made with other options, from another model or other text.

    Raises:
        AdaPrunerError: with what changed and what would be rebuilt.
    """
    outdated: dict[str, list[str]] = {}
    for driver in drivers:
        for name, changes in driver.outdated().items():
            outdated.setdefault(name, []).extend(changes)
    # Without a change of its own, only windows were left out that broke an earlier call.
    if changes := list(dict.fromkeys(change for own in outdated.values() for change in own)):
        raise AdaPrunerError(
            f"{path} holds a run of another configuration ({', '.join(changes)}): {', '.join(outdated)} would be"
            " rebuilt. Choose another `output`, or allow it with `overwrite`"
        )
