"""Which part of which dataset a run uses for what: what is chosen on, trained on and reported must not overlap.

Documents fall into three disjoint parts by the hash of their text. Calibration takes one, the objective of the search
another, and a report on a dataset that is used already takes the third. Documents may be both calibrated and trained
on, as neither is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapruner.calibration import SELF_GENERATED, Source, content_hash, parse_source, read_documents
from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError

# Fields of the config by use, for messages, and what a use did to a model.
_FIELDS = {"pool": "calibration", "objective": "objective", "recovery": "recover", "report": "evaluate"}
_DID = {"pool": "calibrated", "objective": "selected", "recovery": "trained"}
# Windows of the text that is reported on where none is named.
DEFAULT_REPORT_WINDOWS = 256


@dataclass(frozen=True)
class Texts:
    """What each use of a run reads.

    Attributes:
        pool: for calibration; None where the model writes the text.
        objective: what trials are judged on; None where the model writes the text.
        recovery: what the pruned model is trained on; None where it is not, or the dense model writes the text.
        report: what perplexity is reported on, by the name shown in results.
    """

    pool: Source | None
    objective: Source | None
    recovery: Source | None
    report: dict[str, Source]

    @property
    def used(self) -> dict[str, Source]:
        """The sources that change the model, by use: `pool`, `objective`, `recovery`."""
        uses = {"pool": self.pool, "objective": self.objective, "recovery": self.recovery}
        return {use: source for use, source in uses.items() if source is not None}

    def used_documents(self) -> list[str]:
        """All documents that change the model: tasks leave out items that hold one.

        Raises:
            AdaPrunerError: one of the sources cannot be read.
        """
        return [document for source in self.used.values() for document in read_documents(source)]

    def as_records(self) -> list[dict[str, str]]:
        """What a checkpoint records of every source in `used`: `use`, `text`, `identity`, `part` and `columns`.

        A local file is recorded by its name and content, as its folder concerns nobody else.
        """
        return [{"use": use} | _record(source) for use, source in self.used.items()]


def assign_texts(config: PruneConfig, missing_ok: bool = False) -> Texts:
    """Gives every use its source and part. No dataset is read.

    Args:
        missing_ok: whether local files may be missing, for a run that has read them before.

    Raises:
        AdaPrunerError: a source is not known, or two uses would read the same documents.
    """

    def parse(text: str | None) -> Source | None:
        return None if text in (None, SELF_GENERATED) else parse_source(str(text), missing_ok=missing_ok)

    pool, objective, recovery = map(parse, (config.calibration, config.objective or config.calibration, config.recover))
    pool, objective = pool and pool.restrict("calibration"), objective and objective.restrict("objective")
    reports = [parse_source(text, "report", missing_ok) for text in config.evaluate]
    if recovery is not None and recovery.identity in {each.identity for each in (pool, objective, *reports) if each}:
        recovery = recovery.restrict("calibration")
    texts = Texts(pool, objective, recovery, {})
    identities = {source.identity for source in texts.used.values()}
    reports = [source.restrict("report") if source.identity in identities else source for source in reports]
    _refuse_overlaps(texts, reports)
    reports = reports or _default_reports(texts)
    return Texts(pool, objective, recovery, {str(source): source for source in reports})


def report_windows(config: PruneConfig) -> int | None:
    """At most so many windows of each text are reported on; a text that nobody named may be very long."""
    return config.evaluate_windows or (None if config.evaluate else DEFAULT_REPORT_WINDOWS)


def overlaps(records: list[dict[str, str]], source: Source) -> list[str]:
    """How a checkpoint used documents of a source, for example `calibrated on boolq-passages@calibration`.

    Args:
        records: as `Texts.as_records` gives them; those of a checkpoint of others may hold anything.
    """
    given = _record(source)
    return [
        f"{_DID[record['use']]} on {''.join(filter(str.isprintable, record['text']))}"
        for record in records
        if record.keys() >= given.keys() and record.get("use") in _DID and record["identity"] == given["identity"]
        if record["columns"] != given["columns"] or _share_documents(record["part"], given["part"])
    ]


def _record(source: Source) -> dict[str, str]:
    name, identity = str(source), source.identity
    if not identity.startswith("hf:") or identity.startswith("hf:/"):
        name, identity = name.rpartition("/")[2], content_hash(source) or identity.rpartition("/")[2]
    return {"text": name, "identity": identity, "part": source.part, "columns": source.columns}


def _share_documents(one: str, other: str) -> bool:
    return one == other or "all" in (one, other)


def _default_reports(texts: Texts) -> list[Source]:
    """The report part of what was calibrated on, else of the objective, unless it was chosen for something else."""
    source = texts.pool or texts.objective
    if source is None:
        return []
    report = Source(source.name, "report")
    return (
        []
        if any((each.identity, each.part) == (report.identity, "report") for each in texts.used.values())
        else [report]
    )


def _refuse_overlaps(texts: Texts, reports: list[Source]) -> None:
    """Compares every two uses; to calibrate and to train on the same documents is no mistake."""
    uses = [*texts.used.items(), *(("report", source) for source in reports)]
    for number, (use, source) in enumerate(uses):
        for earlier, other in uses[:number]:
            if source.identity != other.identity or use == earlier:
                continue
            if source.columns != other.columns:
                raise AdaPrunerError(
                    f"`{_FIELDS[use]}` and `{_FIELDS[earlier]}` read other columns of the same records, {source} and"
                    f" {other}: their parts may overlap, so name the same column in both"
                )
            if use != "recovery" and source.part == other.part:
                raise AdaPrunerError(
                    f"`{_FIELDS[use]}` would read {source}, which `{_FIELDS[earlier]}` reads already: name another part"
                    " or another text"
                )
