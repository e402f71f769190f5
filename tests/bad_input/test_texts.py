"""Texts that are broken, empty, of another kind, or not there."""

import itertools
import json

import pytest

VERBS = ("prune", "recover", "evaluate")


BROKEN: dict[str, tuple[str, bytes]] = {
    "an empty text": ("a.txt", b""),
    "whitespace": ("a.txt", b" \n\t\n\n  \n"),
    "a text that is too short": ("a.txt", b"w1 w2 w3"),
    "latin-1": ("a.txt", "Füße und Gänse ".encode("latin-1") * 100),
    "utf-16": ("a.txt", ("w1 w2 w3 " * 100).encode("utf-16")),
    "utf-16 without its mark": ("a.txt", ("w1 w2 w3 " * 100).encode("utf-16-le")),
    "binary": ("a.txt", bytes(range(256)) * 10),
    "an empty jsonl": ("a.jsonl", b""),
    "jsonl of empty lines": ("a.jsonl", b"\n\n\n"),
    "jsonl cut off": ("a.jsonl", b'{"text": "w1"}\n{"text": "w2'),
    "jsonl with a broken line": ("a.jsonl", b'{"text": "w1"}\nnot json\n{"text": "w2"}\n'),
    "jsonl of numbers": ("a.jsonl", b"1\n2\n3\n"),
    "jsonl of lists": ("a.jsonl", b"[1]\n[2]\n"),
    "jsonl with other fields": ("a.jsonl", b'{"question": "w1", "answer": "w2"}\n'),
    "jsonl with changing fields": ("a.jsonl", b'{"text": "w1"}\n{"text": {"a": 1}}\n'),
    "jsonl with other names later": ("a.jsonl", b'{"text": "w1"}\n' * 300 + b'{"content": "w2"}\n'),
    "jsonl with other names first": ("a.jsonl", b'{"content": "w1"}\n{"text": "w2"}\n' * 300),
    "jsonl without values": ("a.jsonl", b'{"text": null}\n{"text": null}\n'),
    "jsonl of nothing": ("a.jsonl", b"{}\n{}\n"),
    "jsonl in latin-1": ("a.jsonl", '{"text": "Füße"}\n'.encode("latin-1")),
    "jsonl in utf-16": ("a.jsonl", '{"text": "w1"}\n'.encode("utf-16")),
    "jsonl of endless nesting": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"),
    "jsonl of long numbers": ("a.jsonl", b'{"text": ' + b"9" * 10_000 + b"}\n"),
    "jsonl with half a character": ("a.jsonl", b'{"text": "w1 \\ud800"}\n' * 100),
    "jsonl with half a character in names": ("a.jsonl", b'{"a \\ud800": "w1", "b": "w2"}\n' * 100),
    "binary jsonl": ("a.jsonl", bytes(range(256)) * 10),
    "an empty parquet": ("a.parquet", b""),
    "a parquet of text": ("a.parquet", b"w1 w2 w3\n" * 100),
    "a parquet cut off": ("a.parquet", b"PAR1" + b"\0" * 100),
    "a parquet of a wrong footer": ("a.parquet", b"PAR1" + b"\xff" * 100 + b"\xff\xff\xff\x7fPAR1"),
}


@pytest.mark.parametrize(
    ("case", "verb"), list(zip(BROKEN.values(), itertools.cycle(VERBS), strict=False)), ids=BROKEN.keys()
)
def test_texts_that_are_none(case, verb, command, refused, tmp_path):
    name, content = case
    path = tmp_path / name
    path.write_bytes(content)
    refused(command(verb, text=path), name)


NO_SUCH_TEXT = {
    "@": "unknown part ''",
    "wikitext": "Did you mean 'wikitext2'",
    "c5": "unknown text source 'c5'",
    "nowhere.txt": "there is no file … nowhere.txt",
    "nowhere.parquet": "there is no file … nowhere.parquet",
    "wikitext2@training": "unknown part 'training'",
    "wikitext2:nosplit": "wikitext2:nosplit",
    "hf": "hf:owner/name",
    "hf:": "hf:owner/name",
    "hf::::": "hf:owner/name",
    "hf:a:b:c:d:e:f": "'hf:a:b:c:d:e:f' names no dataset",
    "hf:no spaces in/ids": "hf:owner/name",
    "hf:a/b/c/d": "hf:owner/name",
    "hf:nobody/nothing": "cannot read 'hf:nobody/nothing'",
    "hf:nobody/nothing:config:split:column": "cannot read",
    "http://example.org/text.txt": "unknown text source",
    "~nobody-of-this-name/a.txt": "invalid path",
    "x" * 5000 + ".txt": "invalid path",
    "a\x1b[2J\n.txt": "there is no file",
    "mix@report": "is text that the model writes",
    "": "",
}


@pytest.mark.parametrize(
    ("text", "message", "verb"),
    [(*case, verb) for case, verb in zip(NO_SUCH_TEXT.items(), itertools.cycle(VERBS), strict=False)],
    ids=lambda text: ascii(text)[:30],
)
def test_names_of_no_text(text, message, verb, command, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADAPRUNER_DATA", raising=False)
    refused(command(verb, text=text), *message.split(" … "))


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_is_no_text(verb, command, refused, tmp_path):
    for name in ("folder", "folder.txt", "folder.jsonl"):
        (tmp_path / name).mkdir()
        refused(command(verb, text=tmp_path / name), name)


def test_a_column_that_is_not_there(command, refused, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"passage": "w1 w2", "title": "w3"}))
    for verb in VERBS:
        refused(command(verb, text=f"{path}:text"), "passage, title")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_and_line_ends_of_others_are_no_mistake(name, command, run_cli, text_file, tmp_path):
    paragraphs = text_file.read_text().split("\n\n")
    lines = [json.dumps({"text": one}) for one in paragraphs] if name == "a.jsonl" else paragraphs
    (tmp_path / name).write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    code, output, errors = run_cli(command("evaluate", "--json", text=tmp_path / name))
    assert code == 0, errors
    expected = run_cli(command("evaluate", "--json"))[1]
    assert [json.loads(one)["perplexity"][0]["perplexity"] for one in (output, expected)] == [
        pytest.approx(json.loads(expected)["perplexity"][0]["perplexity"])
    ] * 2


def test_one_giant_line_is_a_text(command, run_cli, tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2 w3 w4 " * 50_000)
    code, _, errors = run_cli(command("evaluate", text=tmp_path / "a.txt"))
    assert code == 0, errors


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "w1"},
        {"instruction": "w1", "output": None},
        {"instruction": None, "output": "w1"},
        {"instruction": "", "output": "w1"},
        {"instruction": ["w1"], "output": None},
        {"instruction": "w1", "output": ""},
    ],
)
def test_instructions_without_an_answer(record, command, refused, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(record)] * 3))
    refused(command("recover", text=path), str(path))
