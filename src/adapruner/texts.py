"""The dataset and its part for every use in a run. No document that changes the model is reported on.

Documents are put into three disjoint parts by the hash of their text. Calibration takes one part, the objective of the
search another, and a report on a dataset that is also used otherwise takes the third. The model may be calibrated and
trained on the same documents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from adapruner.calibration._blend import BlendPart, blend_sources, parse_blend
from adapruner.calibration._reading import content_hash, read_documents
from adapruner.calibration._sources import SELF_GENERATED, Source, parse_source
from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError

# By use: the field of the config, and what was done to the model.
_FIELDS = {"pool": "calibration", "objective": "objective", "recovery": "recover", "report": "evaluate"}
_DID = {"pool": "calibrated", "objective": "selected", "recovery": "trained", "vocabulary": "given its tokens"}
# Windows of the dataset that is reported on if none is named, which may be large.
DEFAULT_REPORT_WINDOWS = 128


@dataclass(frozen=True)
class Texts:
    """The source of every use.

    Attributes:
        pool: for calibration; None if the model generates the text.
        objective: for judging trials; None if the model generates the text.
        recovery: for training the pruned model; empty if it is not trained.
        report: for the reported perplexity, by the name shown in results.
    """

    pool: Source | None
    objective: Source | None
    recovery: tuple[BlendPart, ...]
    report: dict[str, Source]

    @property
    def used(self) -> list[tuple[str, Source]]:
        """The sources that change the model, each with its use: `pool`, `objective`, `recovery`."""
        uses = [("pool", self.pool), ("objective", self.objective)]
        uses += [("recovery", source) for source in blend_sources(self.recovery)]
        return [(use, source) for use, source in uses if source is not None]

    def used_documents(self) -> list[str]:
        """All documents of the used sources that are not empty; tasks leave out items that contain one of them. Windows
        of tokens have none.

        Raises:
            AdaPrunerError: a source cannot be read.
        """
        sources = [source for _, source in self.used if not source.holds_windows]
        return [document for source in sources for document in read_documents(source) if document.strip()]

    def as_records(self) -> list[dict[str, str]]:
        """The records of the sources in `used` in a checkpoint: `use`, `text`, `identity`, `part` and
        `columns`.

        A local file is recorded by its name and the hash of its content, without its folder.
        """
        return [{"use": use} | record_of(source) for use, source in self.used]


def assign_texts(config: PruneConfig) -> Texts:
    """Gives every use its source and part. Reads no dataset; local files may be missing, as a run that resumes does not
    need those that it has read.

    Raises:
        AdaPrunerError: a source is not known, or two uses would read the same documents.
    """

    def parse(text: str | None) -> Source | None:
        return None if text in (None, SELF_GENERATED) else parse_source(str(text), missing_ok=True)

    pool, objective = map(parse, (config.calibration, config.objective_dataset))
    pool, objective = pool and pool.restrict("calibration"), objective and objective.restrict("objective")
    reports = [parse_source(text, "report", missing_ok=True) for text in config.evaluate]
    identities = _identities(pool, objective, *reports)
    recovery = tuple(
        replace(part, source=part.source.restrict("calibration"))
        if part.source and part.source.identity in identities
        else part
        for part in (parse_blend(config.recover, missing_ok=True) if config.recover is not None else ())
    )
    texts = Texts(pool, objective, recovery, {})
    identities = _identities(*(source for _, source in texts.used))
    reports = [source.restrict("report") if source.identity in identities else source for source in reports]
    _refuse_overlaps(texts, reports)
    # By default, the report part of the dataset for calibration or the objective, unless another use takes it.
    source, taken = pool or objective, {(source.identity, source.part) for _, source in texts.used}
    if source and not reports and (source.identity, "report") not in taken:
        reports = [replace(source, part="report")]
    return replace(texts, report={str(source): source for source in reports})


def _identities(*sources: Source | None) -> set[str]:
    return {source.identity for source in sources if source is not None}


def overlaps(records: list[dict[str, Any]], source: Source) -> list[str]:
    """The uses of documents of a source in a checkpoint, as `calibrated on boolq-passages@calibration`.

    Args:
        records: see `Texts.as_records`; records of another form are left out.
    """
    read = record_of(source)
    return [
        f"{_DID[record['use']]} on {record['text']}"
        for record in records
        if record.keys() >= read.keys() and all(isinstance(value, str) for value in record.values())
        if record.get("use") in _DID and record["identity"] == read["identity"]
        if record["columns"] != read["columns"] or record["part"] in ("all", read["part"]) or source.part == "all"
    ]


def record_of(source: Source) -> dict[str, str]:
    """The record of a source in a checkpoint, without its use; see `Texts.as_records`."""
    name, identity = str(source), source.identity
    if not identity.startswith("hf:") or identity.startswith("hf:/"):
        name, identity = name.rpartition("/")[2], content_hash(source) or identity.rpartition("/")[2]
    return {"text": name, "identity": identity, "part": source.part, "columns": source.columns}


def _refuse_overlaps(texts: Texts, reports: list[Source]) -> None:
    """Compares every two uses. Recovery may take the part of calibration or of the objective."""
    uses = [*texts.used, *(("report", source) for source in reports)]
    for (earlier_use, earlier), (use, source) in combinations(uses, 2):
        if source.identity != earlier.identity or use == earlier_use:
            continue
        if source.columns != earlier.columns:
            raise AdaPrunerError(
                f"`{_FIELDS[use]}` and `{_FIELDS[earlier_use]}` read other columns of the same records, {source} and"
                f" {earlier}: their parts may overlap, so name the same column in both"
            )
        if use != "recovery" and source.part == earlier.part:
            raise AdaPrunerError(
                f"`{_FIELDS[use]}` would read {source}, which `{_FIELDS[earlier_use]}` reads already: name another part"
                " or another text"
            )
