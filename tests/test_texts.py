"""Who may use which text: whatever the options, nothing is reported that a model was chosen or trained on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from adapruner.calibration._pool import EvaluationText
from adapruner.calibration._reading import read_documents
from adapruner.calibration._sources import parse_source
from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError
from adapruner.run.nodes.text import drawn_to_report
from adapruner.texts import DEFAULT_REPORT_WINDOWS, Texts, assign_texts, overlaps


def assigned(**options: object) -> Texts:
    return assign_texts(PruneConfig.from_options(model="m", **options))


def as_text(texts: Texts) -> tuple[str, str, str, list[str]]:
    recovery = [part.source for part in texts.recovery] or [None]
    return str(texts.pool), str(texts.objective), ", ".join(map(str, recovery)), list(texts.report)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("c4@calibration", "c4@objective", "None", ["c4@report"])),
        ({"evaluate": ("c4",)}, ("c4@calibration", "c4@objective", "None", ["c4@report"])),
        ({"evaluate": ("ptb",)}, ("c4@calibration", "c4@objective", "None", ["ptb:validation"])),
        (
            {"calibration": "wikitext2"},
            ("wikitext2:train@calibration", "wikitext2:train@objective", "None", ["wikitext2:train@report"]),
        ),
        (
            {"calibration": "wikitext2", "evaluate": ("wikitext2",), "recover": "wikitext2"},
            (
                "wikitext2:train@calibration",
                "wikitext2:train@objective",
                "wikitext2:train@calibration",
                ["wikitext2:test"],
            ),
        ),
        (
            {"calibration": "wikitext2:test", "evaluate": ("wikitext2",)},
            ("wikitext2:test@calibration", "wikitext2:test@objective", "None", ["wikitext2:test@report"]),
        ),
        ({"calibration": "self", "objective": "ptb"}, ("None", "ptb:train@objective", "None", ["ptb:train@report"])),
        ({"calibration": "self", "recover": "self"}, ("None", "None", "None", [])),
        ({"recover": "alpaca"}, ("c4@calibration", "c4@objective", "alpaca", ["c4@report"])),
        (
            {"recover": "alpaca", "evaluate": ("alpaca",)},
            ("c4@calibration", "c4@objective", "alpaca@calibration", ["alpaca@report"]),
        ),
        ({"calibration": "c4@report", "objective": "c4"}, ("c4@report", "c4@objective", "None", [])),
        ({"recover": "c4@report"}, ("c4@calibration", "c4@objective", "c4@report", [])),
        (
            {"objective": "ptb", "evaluate": ("c4@report", "ptb:train")},
            ("c4@calibration", "ptb:train@objective", "None", ["c4@report", "ptb:train@report"]),
        ),
    ],
)
def test_parts_by_default(options, expected):
    assert as_text(assigned(**options)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate": ("c4@calibration",)}, "`evaluate` would read c4@calibration, which `calibration` reads already"),
        ({"evaluate": ("c4@objective",)}, "`evaluate` would read c4@objective, which `objective` reads already"),
        ({"objective": "c4@calibration"}, "`objective` would read c4@calibration, which `calibration` reads already"),
        ({"recover": "alpaca@report", "evaluate": ("alpaca",)}, "alpaca@report, which `recover` reads already"),
        ({"evaluate": ("hf:allenai/c4:en:train:url",)}, "`evaluate` and `calibration` read other columns of the same"),
        ({"calibration": "c5"}, "unknown text source 'c5'"),
    ],
)
def test_what_would_be_used_twice_is_refused(options, message):
    with pytest.raises(AdaPrunerError, match=message):
        assigned(**options)


def test_a_document_without_text_is_in_no_item(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ["", " ", "w1", "w2", "w3"]))
    used = assigned(calibration=f"{tmp_path}/a.jsonl@calibration", objective="self").used_documents()
    assert used
    assert all(document.strip() for document in used)


def test_a_path_may_have_the_sign_of_a_part(tmp_path):
    folder = tmp_path / "x@y"
    folder.mkdir()
    (folder / "d.jsonl").write_text('{"text": "w1"}')
    for text, part in (("d.jsonl", "all"), ("d.jsonl:text", "all"), ("d.jsonl:text@report", "report")):
        source = parse_source(f"{folder}/{text}")
        assert (source.name, source.part) == (f"{folder}/{text.removesuffix('@report')}", part)
    (folder / "d.jsonl").unlink()
    assert parse_source(f"{folder}/d.jsonl", missing_ok=True).part == "all"
    assert parse_source(f"hf:{folder}").name == f"hf:{folder}"
    assert parse_source(f"hf:{folder}@report").part == "report"


def test_two_columns_of_a_file_are_one_text(tmp_path, monkeypatch):
    """The parts by one column are not those by another: 4 of 10 documents of a report would have been calibrated on."""
    monkeypatch.chdir(tmp_path)
    records = [{"question": f"w{number}", "text": f"w{number % 7} w{number}"} for number in range(300)]
    Path("qa.jsonl").write_text("\n".join(map(json.dumps, records)))
    for options in (
        {"calibration": "qa.jsonl", "evaluate": ("qa.jsonl:question",)},
        {"calibration": "./qa.jsonl:question", "objective": str(tmp_path / "qa.jsonl")},
        {"calibration": "qa.jsonl:text", "recover": "qa.jsonl:question"},
    ):
        with pytest.raises(AdaPrunerError, match="name the same column in both"):
            assigned(**options)
    texts = assigned(calibration="qa.jsonl:question", evaluate=("./qa.jsonl:question",))
    assert list(texts.report) == ["./qa.jsonl:question@report"]


NAMES = [
    f"{name}{part}"
    for name in ("a.jsonl", "a.jsonl:text", "a.jsonl:other", "b.txt")
    for part in ("", "@calibration", "@objective", "@report")
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    records = [{"text": f"w{number}", "other": f"w{number} w{number}"} for number in range(60)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "b.txt").write_text("\n".join(f"x{number} x" for number in range(60)))
    return folder


@given(
    calibration=st.sampled_from(["self", *NAMES]),
    objective=st.sampled_from([None, *NAMES]),
    recover=st.sampled_from([None, "self", *NAMES]),
    evaluate=st.lists(st.sampled_from(NAMES), max_size=2),
)
def test_nothing_reported_was_used(files, calibration, objective, recover, evaluate):
    def here(name: str | None) -> str | None:
        return name if name in (None, "self") else f"{files}/{name}"

    options = {"calibration": here(calibration), "objective": here(objective), "recover": here(recover)}
    try:
        texts = assigned(**options, evaluate=tuple(map(here, evaluate)))
    except AdaPrunerError:
        return

    def numbers(documents: list[str]) -> set[str]:
        return {document.split()[0] for document in documents}

    used = numbers(texts.used_documents()) if texts.used else set()
    for source in texts.report.values():
        assert not numbers(read_documents(source)) & used
        assert overlaps(texts.as_records(), source) == []
    if texts.pool is not None and texts.objective is not None:
        assert not numbers(read_documents(texts.pool)) & numbers(read_documents(texts.objective))


def test_a_run_that_has_read_its_texts_does_not_need_them(tmp_path):
    path = tmp_path / "gone.jsonl"
    config = PruneConfig(model="m", calibration=f"{path}:text")
    assert str(assign_texts(config).pool) == f"{path}:text@calibration"


def test_what_a_checkpoint_records(tmp_path):
    path = tmp_path / "secret" / "a.txt"
    path.parent.mkdir()
    path.write_text("w1\n\nw2")
    texts = assigned(calibration=str(path), objective="ptb", recover="c4", evaluate=("c4",))
    records = texts.as_records()
    assert [(record["use"], record["text"], record["part"]) for record in records] == [
        ("pool", "a.txt@calibration", "calibration"),
        ("objective", "ptb:train@objective", "objective"),
        ("recovery", "c4@calibration", "calibration"),
    ]
    assert "secret" not in json.dumps(records)
    assert overlaps(records, parse_source("ptb")) == ["selected on ptb:train@objective"]
    assert overlaps(records, parse_source("hf:allenai/c4:en:train:url@report")) == ["trained on c4@calibration"]
    for text in ("c4@report", "ptb:test", "wikitext2"):
        assert overlaps(records, parse_source(text)) == []
    broken = [{"use": "pool"}, records[0] | {"use": "magic"}, records[2] | {"text": "c4\x1b[2J"}]
    assert overlaps(broken, parse_source("c4")) == ["trained on c4\x1b[2J"]


def test_a_text_that_nobody_named_is_reported_on_in_part(monkeypatch):
    limits = []

    def note_limit(*arguments: Any, bos: bool) -> EvaluationText:
        limits.append(arguments[3])
        return EvaluationText(torch.zeros(1, 2, dtype=torch.int64), 2, {})

    monkeypatch.setattr("adapruner.run.nodes.text.evaluation_text", note_limit)
    empty = SimpleNamespace(config=SimpleNamespace(vocab_size=1))
    for evaluate, evaluate_windows in ((("ptb",), None), ((), None), ((), 7)):
        drawn_to_report.make({"ptb": parse_source("ptb")}, None, empty, 128, evaluate, evaluate_windows, True)
    assert limits == [None, DEFAULT_REPORT_WINDOWS, 7]
