"""Secrets: tokens in the environment, in URLs and in the configs of others are in nothing that is written or said."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from adapruner.base.errors import without_secrets
from run_helpers import QUICK, exit_code, prune_command

SECRET = "hf_" + "Sx9" * 12
PASSWORD = "pa55w0rd"
URL = f"https://user:{PASSWORD}@example.org/owner/name"


@pytest.fixture
def folder(model_folder, tmp_path):
    """A model with secrets in all its configs."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    fields = {"token": SECRET, "hub": {"api_key": SECRET}, "source": URL, "name_or_path": URL}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields | {"_name_or_path": URL}))
    (folder / "adapruner.json").write_text(json.dumps({"format": 1, "base_model": URL, "texts": [{"name": URL}]}))
    (folder / "README.md").write_text(f"---\nlicense: mit\ntoken: {SECRET}\n---\n{SECRET} {URL}\n")
    return folder


@pytest.fixture(autouse=True)
def _in_the_environment(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)


def files_with_secrets(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in paths if secrets_in(path.read_bytes())]


def secrets_in(content: bytes) -> list[bytes]:
    return [secret for secret in (SECRET.encode(), PASSWORD.encode()) if secret in content]


def test_nothing_that_is_made_has_secrets(folder, text_file, tmp_path, capsys):
    made = tmp_path / "made"
    assert exit_code([*prune_command(folder, made / "run", text_file, QUICK | {"heal": "2k"}), "--json"]) == 0
    run = made / "run"
    for command in (
        ["prune", "--from", str(run), "--ratio", "0.05", "-o", str(made / "other")],
        ["report", str(run)],
        ["inspect", str(folder)],
    ):
        assert exit_code(command) == 0
    assert len([*made.rglob("*.json")]) > 40
    assert files_with_secrets(made) == []
    said = capsys.readouterr()
    assert secrets_in((said.out + said.err).encode()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", URL],
        ["evaluate", "MODEL", "--evaluate", URL],
        ["evaluate", "MODEL", "--evaluate", f"hf:{URL}"],
        ["prune", "MODEL", "--calibration", f"{URL}.jsonl", "-o", "OUT"],
        ["inspect", f"https://example.org/model?token={SECRET}"],
    ],
)
def test_messages_have_no_secrets(arguments, folder, tmp_path, capsys):
    places = {"MODEL": str(folder), "OUT": str(tmp_path / "out")}
    assert exit_code([places.get(argument, argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert secrets_in((said.out + said.err).encode()) == []
    assert not (tmp_path / "out").exists()


def test_tracebacks_have_no_secrets(folder, monkeypatch, tmp_path, capsys):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"no answer of {URL} with the header Authorization: Bearer {os.environ['HF_TOKEN']}")

    monkeypatch.setattr("adapruner.run.steps.inspect", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert exit_code(["inspect", str(folder)]) == 1
    [log] = tmp_path.glob("adapruner-*.log")
    assert "RuntimeError" in log.read_text()
    assert secrets_in(log.read_bytes()) == []
    assert secrets_in(capsys.readouterr().err.encode()) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"at {URL}: no", "at https://…@example.org/owner/name: no"),
        (f"{SECRET}, and", "hf_…, and"),
        ("https://example.org/a?x=1&access_token=abc&y=2", "https://example.org/a?x=1&access_token=…&y=2"),
        (r'{"a": "b(eos_token=\"</s>\")"}', r'{"a": "b(eos_token=\"</s>\")"}'),
        ("owner/name@main hf:owner/hf_transfer", "owner/name@main hf:owner/hf_transfer"),
    ],
)
def test_what_is_a_secret(text, shown):
    assert without_secrets(text) == shown
