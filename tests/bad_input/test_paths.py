"""Paths that must work, and paths that cannot."""

import json
import os
import shutil

import pytest

from adapruner.checkpoint import save_checkpoint
from conftest import tiny_model
from run_helpers import byte_tokenizer

WRITING = ("prune", "recover", "export")


def test_spaces_and_letters_of_every_alphabet_will_do(model_folder, text_file, tmp_path, command, run_cli):
    """From a model to everything that is made of it, below folders that are not there yet."""
    home = tmp_path / "Füße und 模型 [bold] 'q' \"q\" $x;#&"
    model, text = home / "a model: 1@2", home / "some text @all.txt"
    shutil.copytree(model_folder, model)
    shutil.copy(text_file, text)
    bytes_alone = home / "模型"
    save_checkpoint(tiny_model(vocab_size=300), byte_tokenizer(), bytes_alone)
    outputs = {verb: home / "новый" / f"{verb} 📦" for verb in WRITING}
    for verb in (*WRITING, "evaluate", "benchmark", "inspect"):
        source = bytes_alone if verb == "export" else model
        arguments = command(verb, "--json", model=source, text=text, output=outputs.get(verb, ""))
        code, output, errors = run_cli(arguments)
        assert code == 0, errors
        assert json.loads(output)
    other = ["prune", "--from", str(outputs["prune"]), "--ratio", "0.05", "-o", str(home / "ein anderes")]
    assert run_cli(other)[0] == 0
    assert (outputs["prune"] / "model" / "config.json").is_file()


@pytest.mark.parametrize("verb", WRITING)
def test_outputs_that_cannot_be(verb, command, refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    said = {"file": "exists and holds no run", "file/below": "cannot write to", "full": "exists and holds no run"}
    for output in ("file", "file/below", "file/below/that", "loop", "loop/below", "full", "x" * 300, "x" * 5000):
        refused(command(verb, output=tmp_path / output), said.get(output, "") if verb == "prune" else "")
    refused(command(verb, "--overwrite", output=tmp_path / "full"), "is not a file" if verb == "export" else "holds ")
    for output in ("", ".", "..", "/", "/proc/nothing", "/dev/null", "/dev/null/below", "~nobody-of-this-name/x"):
        if not (output in ("", ".") and verb == "prune"):
            refused(command(verb, output=output))
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]
    assert os.listdir(tmp_path / "empty") == []


def test_an_exported_file_that_cannot_be(command, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full" / "below").mkdir(parents=True)
    for output in ("file/model.gguf", "file", "full", "x" * 300 + ".gguf"):
        arguments = command("export", "--to", "gguf", output=tmp_path / output)
        refused(arguments)
        refused([*arguments, "--overwrite"], "is not a file" if output == "full" else "")


@pytest.mark.parametrize("verb", WRITING)
def test_an_output_that_is_the_model(verb, refused, command, model_folder):
    before = sorted(os.listdir(model_folder))
    refused(command(verb, output=model_folder))
    assert sorted(os.listdir(model_folder)) == before


def test_no_earlier_run(finished, refused, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("mine")
    others = ["--ratio", "0.05", "-o"]
    for run in ("nowhere", "loop", "file", "file/below", "x" * 5000):
        refused(["prune", "--from", str(tmp_path / run), *others, str(tmp_path / "b")])
    refused(["prune", "--from", str(tmp_path), *others, str(tmp_path / "b")], "holds no run")
    assert not (tmp_path / "b").exists()
    itself = str(finished.output)
    refused(["prune", "--from", itself, *others, itself, "--overwrite"], "is the earlier run itself")
    refused(["prune", "--from", itself], "name the folder of the new run: --output")
    assert finished.model_folder.is_dir()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"config": 1}', bytes(range(256))])
def test_a_record_of_a_recovery_that_is_broken(content, command, refused, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "recovery.json").write_bytes(content)
    refused(command("recover", output=tmp_path / "there"), "holds no such recovery")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to this user")
@pytest.mark.parametrize("verb", WRITING)
def test_a_folder_that_is_closed(verb, command, refused, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(command(verb, output=tmp_path / "closed" / "below"), "closed")
