"""Blends of datasets, such as `mix,notes.txt:0.5`, and the part of each for every use in a run.

No document that changes the model is reported on. Documents are put into three disjoint parts by the hash of their
text: calibration takes one part, the objective of the search another, and a report on a dataset that is also used
otherwise takes the third. The model is calibrated and trained on the same documents.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import given_path
from adapruner.options import PruneConfig
from adapruner.text.reading import content_hash, read_documents
from adapruner.text.sources import ANSWERS, MIX, Part, Source, absolute_source, parse_source, source_names
from adapruner.text.written import kinds

_SHARE = re.compile(r"-?(\d+\.?\d*|\.\d+)")


@dataclass(frozen=True)
class BlendPart:
    """A dataset of a blend.

    Attributes:
        name: as the user wrote it, without the share; of `mix`, one of its kinds of text.
        share: the fraction of all text; the shares of a blend add up to 1.
        source: the dataset; of `answers:DATASET`, that of the prompts; None for a kind of `mix`.
    """

    name: str
    share: float
    source: Source | None

    @property
    def is_written(self) -> bool:
        """True for text that a model writes: a kind of `mix`, or answers to the prompts of the source."""
        return self.source is None or self.name.startswith(ANSWERS)

    @property
    def description(self) -> str:
        """The dataset in messages, with its part."""
        return str(self.source) if self.source and not self.is_written else self.name


def parse_blend(text: str, missing_ok: bool = False) -> tuple[BlendPart, ...]:
    """Reads `DATASET`, or several with their shares, `DATASET:SHARE,DATASET:SHARE`. Those without a share have equal
    parts of what is left.

    A dataset is as for `parse_source`, or `answers:DATASET`, or `mix`: all of its kinds, equally. Its share is the
    number after its last colon.

    Args:
        missing_ok: accept a local file that is missing.
    """
    named = _split(text)
    names, numbers = [name for name, _ in named], [number for _, number in named if number]
    if not named or not all(names):
        raise AdaPrunerError(f"{text!r} names no dataset: expected DATASET, or DATASET:SHARE,DATASET:SHARE")
    if len(named) == 1 and numbers and float(numbers[0]) != 1:
        raise AdaPrunerError(
            f"{text!r} needs no share: remove :{numbers[0]}; if that is part of the name, write {text}:1"
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise AdaPrunerError(f"{twice!r} is named twice: write it once, with the sum of its shares")
    shares = [float(number) for number in numbers]
    without = len(named) - len(numbers)
    if min(shares, default=1.0) < 0 or (without and sum(shares) >= 1) or (not without and not sum(shares)):
        raise AdaPrunerError(
            f"the shares in {text!r} are {', '.join(numbers)}: none may be negative, one must be more than 0, and they"
            " must leave something to datasets without a share"
        )
    rest = (1 - sum(shares)) / without if without else 0.0
    total = sum(shares) + rest * without
    parts = list[BlendPart]()
    for name, number in named:
        share = (float(number) if number else rest) / total
        if share and name == MIX:
            parts += [BlendPart(kind, share / len(kinds()), None) for kind in kinds()]
        elif share:
            parts.append(BlendPart(name, share, _source(name, missing_ok)))
    if len({part.name for part in parts}) < len(parts):
        raise AdaPrunerError(f"a dataset in {text!r} has the name of a kind of {MIX} ({', '.join(kinds())}): rename it")
    return tuple(parts)


def sources_of(blend: Sequence[BlendPart]) -> list[tuple[str, Source]]:
    """The datasets that a blend reads, each with the name of its part."""
    return [(part.name, part.source) for part in blend if part.source]


def absolute_blend(text: str, part: Part = "all") -> str:
    """The same blend with absolute paths, valid in any working directory, and with each dataset restricted to a part
    unless the user already chose one."""
    parts = []
    for name, number in _split(text):
        dataset = name.removeprefix(ANSWERS)
        if name != MIX:
            chosen = "" if part == "all" or _source(name, missing_ok=True).part != "all" else f"@{part}"
            dataset = absolute_source(dataset) + chosen
        prefix = ANSWERS if name.startswith(ANSWERS) else ""
        parts.append(f"{prefix}{dataset}{number and f':{number}'}")
    return ",".join(parts)


def _source(name: str, missing_ok: bool) -> Source:
    if name == ANSWERS + MIX:
        raise AdaPrunerError(f"{name!r}: {MIX} has answers already; name a dataset of instructions")
    return parse_source(name.removeprefix(ANSWERS), missing_ok=missing_ok)


def _split(text: str) -> list[tuple[str, str]]:
    """The names and their shares, as they are written; the share is empty where there is none."""
    whole = _with_share(text)
    name, _, part = whole[0].rpartition("@")
    is_one = _is_file(whole[0]) or ("," not in part and _is_file(name))
    return [whole] if is_one else [*map(_with_share, source_names([text]))]


def _with_share(text: str) -> tuple[str, str]:
    name, colon, number = text.rpartition(":")
    if not colon or not _SHARE.fullmatch(number):
        return text, ""
    if not name or not _is_file(text):
        return name, number
    if _is_file(name):
        raise AdaPrunerError(f"{text!r} is a file, and {name!r} too: rename one of them")
    return text, ""


def _is_file(name: str) -> bool:
    return given_path(name.removeprefix(ANSWERS)).is_file()


def counts_of(blend: Sequence[BlendPart], count: int) -> dict[str, int]:
    """The number of windows of each part of a blend, which add up to `count` (largest remainders); at least one of each
    dataset, which a checkpoint names."""
    if count < (datasets := len(sources_of(blend))):
        raise AdaPrunerError(
            f"{count} windows are fewer than the {datasets} datasets that they are of: name fewer, or raise `pool`,"
            " `objective_windows` and `compensation_windows`"
        )
    exact = [part.share * count for part in blend]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(blend)), key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: count - sum(counts)]:
        counts[part] += 1
    for place in (place for place, part in enumerate(blend) if part.source and not counts[place]):
        counts[max(range(len(blend)), key=lambda other: (counts[other], not blend[other].source))] -= 1
        counts[place] = 1
    return {part.name: number for part, number in zip(blend, counts, strict=True)}


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
        of tokens have none."""
        sources = [source for _, source in self.used if not source.holds_windows]
        return [document for source in sources for document in read_documents(source) if document.strip()]

    def as_records(self) -> list[dict[str, str]]:
        """The records of the sources in `used` in a checkpoint: `use`, `text`, `identity`, `part` and
        `columns`.

        A local file is recorded by its name and the hash of its content, without its folder.
        """
        return [{"use": use} | record_of(source) for use, source in self.used]


def assign_texts(config: PruneConfig) -> Texts:
    """Gives every use its source and part. Parses no dataset; local files may be missing, as a run that resumes does
    not need those that it has read."""

    calibration = _of_part(parse_blend(config.calibration, missing_ok=True), "calibration")
    judging = (config.objective or config.calibration) if config.default_trials else None
    objective = _of_part(parse_blend(judging, missing_ok=True), "objective") if judging else ()
    if answered := next((part.name for part in (*calibration, *objective) if part.name.startswith(ANSWERS)), None):
        raise AdaPrunerError(f"{answered!r} is for fine-tuning: name the dataset itself")
    texts = Texts(calibration, objective, {})
    reports = [parse_source(text, "report", missing_ok=True) for text in config.evaluate]
    by_path = {source.identity: source for source in [source for _, source in texts.used] + reports}
    # Copies of a file are one text.
    contents = {path: (source.path and content_hash(source)) or path for path, source in by_path.items()}
    used = {contents[source.identity] for _, source in texts.used}
    reports = [source.restrict("report") if contents[source.identity] in used else source for source in reports]
    _refuse_overlaps(texts, reports, contents)
    if not reports:
        # By default, the report parts of the datasets for calibration or the objective, unless another use takes them.
        for _, source in sources_of(calibration) or sources_of(objective):
            others = [other for _, other in texts.used if contents[other.identity] == contents[source.identity]]
            if not any(other.part == "report" or other.columns != source.columns for other in others):
                reports.append(replace(source, part="report"))
    return replace(texts, report={str(source): source for source in reports})


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


def _refuse_overlaps(texts: Texts, reports: list[Source], contents: dict[str, str]) -> None:
    """Compares every two uses, by the content of each source (by its identity)."""
    uses = [*texts.used, *(("report", source) for source in reports)]
    for (earlier_use, earlier), (use, source) in combinations(uses, 2):
        if contents[source.identity] != contents[earlier.identity] or use == earlier_use:
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
