"""The dataset and its part for every use in a run. No document that changes the model is reported on.

Documents are put into three disjoint parts by the hash of their text. Calibration takes one part, the objective of the
search another, and a report on a dataset that is also used otherwise takes the third. The model is calibrated and
trained on the same documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from adapruner.base.errors import AdaPrunerError
from adapruner.options import PruneConfig
from adapruner.text.blends import BlendPart, parse_blend, sources_of
from adapruner.text.reading import content_hash, read_documents
from adapruner.text.sources import ANSWERS, Part, Source, parse_source

# By use: the field of the config, and what was done to the model.
_FIELDS = {"pool": "calibration", "objective": "objective", "report": "evaluate"}
_DID = {"pool": "calibrated", "objective": "selected", "recovery": "trained", "vocabulary": "given its tokens"}
# Windows of the dataset that is reported on if none is named, which may be large.
DEFAULT_REPORT_WINDOWS = 128


@dataclass(frozen=True)
class Texts:
    """The source of every use.

    Attributes:
        calibration: for everything that is measured on the dense model, and for training the pruned one.
        objective: for judging trials.
        report: for the reported perplexity, by the name shown in results.
    """

    calibration: tuple[BlendPart, ...]
    objective: tuple[BlendPart, ...]
    report: dict[str, Source]

    @property
    def used(self) -> list[tuple[str, Source]]:
        """The sources that change the model, each with its use: `pool`, `objective`."""
        uses = (("pool", self.calibration), ("objective", self.objective))
        return [(use, source) for use, blend in uses for _, source in sources_of(blend)]

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

    calibration = _of_part(parse_blend(config.calibration, missing_ok=True), "calibration")
    objective = _of_part(parse_blend(config.objective_dataset, missing_ok=True), "objective")
    if answered := next((part.name for part in (*calibration, *objective) if part.name.startswith(ANSWERS)), None):
        raise AdaPrunerError(f"{answered!r} is for fine-tuning: name the dataset itself")
    texts = Texts(calibration, objective, {})
    reports = [parse_source(text, "report", missing_ok=True) for text in config.evaluate]
    identities = {source.identity for _, source in texts.used}
    reports = [source.restrict("report") if source.identity in identities else source for source in reports]
    _refuse_overlaps(texts, reports)
    if not reports:
        # By default, the report parts of the datasets for calibration or the objective, unless another use takes them.
        sources = [source for _, source in sources_of(calibration) or sources_of(objective)]
        reports = [replace(source, part="report") for source in sources if not _is_taken(source, texts.used)]
    return replace(texts, report={str(source): source for source in reports})


def _is_taken(source: Source, used: Sequence[tuple[str, Source]]) -> bool:
    """True if another use may read documents of the report part of a dataset."""
    others = [other for _, other in used if other.identity == source.identity]
    return any(other.part == "report" or other.columns != source.columns for other in others)


def _of_part(blend: tuple[BlendPart, ...], part: Part) -> tuple[BlendPart, ...]:
    """The same, with each dataset restricted to a part unless the user already chose one."""
    return tuple(replace(each, source=each.source and each.source.restrict(part)) for each in blend)


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
    """Compares every two uses."""
    uses = [*texts.used, *(("report", source) for source in reports)]
    for (earlier_use, earlier), (use, source) in combinations(uses, 2):
        if source.identity != earlier.identity or use == earlier_use:
            continue
        if source.columns != earlier.columns:
            raise AdaPrunerError(
                f"`{_FIELDS[use]}` and `{_FIELDS[earlier_use]}` read other columns of the same records, {source} and"
                f" {earlier}: their parts may overlap, so name the same column in both"
            )
        if source.part == earlier.part:
            raise AdaPrunerError(
                f"`{_FIELDS[use]}` would read {source}, which `{_FIELDS[earlier_use]}` reads already: name another part"
                " or another text"
            )
