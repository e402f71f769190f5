"""Who may use which text: whatever the options, nothing is reported that a model was chosen or trained on."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from adapruner.base.errors import AdaPrunerError
from adapruner.options import PruneConfig
from adapruner.run.inputs import drawn_to_report
from adapruner.text.blends import DEFAULT_REPORT_WINDOWS, Texts, assign_texts, overlaps, record_of, sources_of
from adapruner.text.reading import read_documents
from adapruner.text.sources import parse_source
from adapruner.text.windows import EvaluationText, texts_to_report


def assigned(**options: object) -> Texts:
    return assign_texts(PruneConfig.from_options(model="m", trials=8, **options))


def test_without_a_search_no_text_judges_trials():
    texts = assign_texts(PruneConfig.from_options(model="m", calibration="c4", evaluate=("c4@objective",)))
    assert (texts.objective, [use for use, _ in texts.used]) == ((), ["pool"])


def as_text(texts: Texts) -> tuple[str, str, list[str]]:
    calibration, objective = (
        ", ".join(str(part.source or part.name) for part in blend) for blend in (texts.calibration, texts.objective)
    )
    return calibration, objective, list(texts.report)


MIX = "prose, code, mathematics, questions, dialogue, instructions, languages"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (MIX, MIX, [])),
        ({"calibration": "c4"}, ("c4@calibration", "c4@objective", ["c4@report"])),
        ({"calibration": "c4", "evaluate": ("c4",)}, ("c4@calibration", "c4@objective", ["c4@report"])),
        ({"calibration": "c4", "evaluate": ("ptb",)}, ("c4@calibration", "c4@objective", ["ptb:validation"])),
        (
            {"calibration": "wikitext2"},
            ("wikitext2:train@calibration", "wikitext2:train@objective", ["wikitext2:train@report"]),
        ),
        (
            {"calibration": "wikitext2", "evaluate": ("wikitext2",)},
            ("wikitext2:train@calibration", "wikitext2:train@objective", ["wikitext2:test"]),
        ),
        (
            {"calibration": "wikitext2:test", "evaluate": ("wikitext2",)},
            ("wikitext2:test@calibration", "wikitext2:test@objective", ["wikitext2:test@report"]),
        ),
        ({"objective": "ptb"}, (MIX, "ptb:train@objective", ["ptb:train@report"])),
        (
            {"calibration": "mix,alpaca:0.5"},
            (f"{MIX}, alpaca@calibration", f"{MIX}, alpaca@objective", ["alpaca@report"]),
        ),
        (
            {"calibration": "ptb,alpaca", "evaluate": ("c4", "alpaca")},
            (
                "ptb:train@calibration, alpaca@calibration",
                "ptb:train@objective, alpaca@objective",
                ["c4", "alpaca@report"],
            ),
        ),
        ({"calibration": "c4@report", "objective": "c4"}, ("c4@report", "c4@objective", [])),
        (
            {"calibration": "c4", "objective": "ptb", "evaluate": ("c4@report", "ptb:train")},
            ("c4@calibration", "ptb:train@objective", ["c4@report", "ptb:train@report"]),
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
        ({"evaluate": ("hf:allenai/c4:en:train:url",)}, "`evaluate` and `calibration` read other columns of the same"),
        ({"calibration": "c5"}, "unknown text source 'c5'"),
        ({"calibration": "answers:alpaca"}, "'answers:alpaca' is for fine-tuning: name the dataset itself"),
    ],
)
def test_what_would_be_used_twice_is_refused(options, message):
    with pytest.raises(AdaPrunerError, match=message):
        assigned(**{"calibration": "c4"} | options)


def test_a_document_without_text_is_in_no_item(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ["", " ", "w1", "w2", "w3"]))
    used = assigned(calibration=f"{tmp_path}/a.jsonl@calibration", objective="mix").used_documents()
    assert used
    assert all(document.strip() for document in used)


def test_a_missing_value_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}\n{"text": NaN}\n{"text": null}\n{"text": 2.5}\n')
    assert read_documents(parse_source(f"{tmp_path}/a.jsonl")) == ["w1", "", "", "2.5"]


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
    calibration=st.lists(st.sampled_from(["mix", *NAMES]), min_size=1, max_size=2, unique=True),
    objective=st.sampled_from([None, *NAMES]),
    evaluate=st.lists(st.sampled_from(NAMES), max_size=2),
)
def test_nothing_reported_was_used(files, calibration, objective, evaluate):
    def here(name: str | None) -> str | None:
        return name if name in (None, "mix") else f"{files}/{name}"

    options = {"calibration": ",".join(map(here, calibration)), "objective": here(objective)}
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
    for one, other in product(sources_of(texts.calibration), sources_of(texts.objective)):
        assert not numbers(read_documents(one[1])) & numbers(read_documents(other[1]))


def test_a_copy_of_a_file_is_the_same_text(tmp_path):
    text = "\n\n".join(f"w{number}" for number in range(100))
    paths = [tmp_path / name for name in ("text.txt", "copy.txt", "other.txt")]
    for path, content in zip(paths, (text, text, f"{text} w1"), strict=True):
        path.write_text(content)
    texts = assigned(calibration=str(paths[0]), objective=str(paths[1]), evaluate=tuple(map(str, paths[1:])))
    assert list(texts.report) == [f"{paths[1]}@report", str(paths[2])]
    with pytest.raises(AdaPrunerError, match="which `calibration` reads already"):
        assigned(calibration=str(paths[0]), evaluate=(f"{paths[1]}@calibration",))


def test_a_run_that_has_read_its_texts_does_not_need_them(tmp_path):
    path = tmp_path / "gone.jsonl"
    config = PruneConfig(model="m", calibration=f"{path}:text")
    assert str(assign_texts(config).calibration[0].source) == f"{path}:text@calibration"


def test_what_a_checkpoint_records(tmp_path):
    path = tmp_path / "secret" / "a.txt"
    path.parent.mkdir()
    path.write_text("w1\n\nw2")
    texts = assigned(calibration=str(path), objective="ptb", evaluate=("c4",))
    records = texts.as_records()
    assert [(record["use"], record["text"], record["part"]) for record in records] == [
        ("pool", "a.txt@calibration", "calibration"),
        ("objective", "ptb:train@objective", "objective"),
    ]
    assert "secret" not in json.dumps(records)
    assert overlaps(records, parse_source("ptb")) == ["selected on ptb:train@objective"]
    trained = {"use": "recovery"} | record_of(parse_source("c4@calibration"))
    records.append(trained)
    assert overlaps(records, parse_source("hf:allenai/c4:en:train:url@report")) == ["trained on c4@calibration"]
    for text in ("c4@report", "ptb:test", "wikitext2"):
        assert overlaps(records, parse_source(text)) == []
    broken = [{"use": "pool"}, records[0] | {"use": "magic"}, records[2] | {"text": "c4\x1b[2J"}]
    assert overlaps(broken, parse_source("c4")) == ["trained on c4\x1b[2J"]


def test_a_text_that_nobody_named_is_reported_on_in_part(monkeypatch):
    limits = []

    def note_limit(*arguments: Any) -> dict[str, EvaluationText]:
        limits.append(arguments[3])
        return {"ptb": EvaluationText(torch.zeros(1, 2, dtype=torch.int64), 2, {})}

    monkeypatch.setattr("adapruner.run.inputs.texts_to_report", note_limit)
    empty = SimpleNamespace(config=SimpleNamespace(vocab_size=1))
    for evaluate, limit in ((("ptb",), None), ((), None), ((), 7)):
        drawn_to_report.make({"ptb": parse_source("ptb")}, None, empty, 128, evaluate, limit, True, ())
    assert limits == [None, DEFAULT_REPORT_WINDOWS, 7]


def test_long_windows_are_reported_on_too(tokenizer, tmp_path):
    """As long as the model and the text allow, of as many tokens as the short ones."""
    path = tmp_path / "a.txt"
    path.write_text(" ".join(f"w{number % 90}" for number in range(1000)))

    def shapes(seq_len: int, limit: int | None, positions: int | None) -> list[tuple[int, int]]:
        texts = texts_to_report(parse_source(str(path)), tokenizer, seq_len, limit, positions, name="a")
        assert [*texts] == ["a", *(f"a, {len(text.windows[0]):,} tokens" for text in [*texts.values()][1:])]
        return [(*text.windows.shape,) for text in texts.values()]

    assert shapes(10, None, None) == [(100, 10), (1, 1000)]
    assert shapes(10, None, 256) == [(100, 10), (3, 256)]
    assert shapes(10, 40, 100) == [(40, 10), (4, 100)]
    assert shapes(10, 40, 10) == [(40, 10)]
    assert shapes(500, 1, None) == [(1, 500)]
