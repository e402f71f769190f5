"""A fingerprint changes with every file that a model is computed from, and is cheap for large ones."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from adapruner.base.errors import AdaPrunerError
from adapruner.model.places import find_model, fingerprint


@pytest.fixture
def folder(model_folder, tmp_path):
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def of(folder: Path) -> str:
    return fingerprint(find_model(str(folder)))


def change_a_weight(folder: Path) -> None:
    """A single one, in place, with the time of the file set back."""
    path = folder / "model.safetensors"
    stat, tensors = path.stat(), load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a weight": change_a_weight,
    "the config": lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 1e-4})
    ),
    "the tokenizer": lambda folder: (folder / "tokenizer.json").write_bytes(
        (folder / "tokenizer.json").read_bytes().replace(b"w17", b"w7l")
    ),
    "a chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "a name": lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_computed_from_counts(change, folder):
    before = of(folder)
    assert of(folder) == before
    change(folder)
    assert of(folder) != before


def test_copies_and_what_is_said_of_a_model_do_not_count(folder, tmp_path):
    before = of(folder)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy" / "README.md").write_text("another card")
    (tmp_path / "copy" / "adapruner.json").write_text("{}")
    (tmp_path / "copy" / "pytorch_model.bin").write_bytes(b"never read")
    assert of(tmp_path / "copy") == before


def test_14_gb_are_quick(folder):
    """Large files count by their size, their time, and blocks of theirs."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(14 * 10**9)
    started = time.process_time()
    before = of(folder)
    assert time.process_time() - started < 2
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(7 * 10**9)
        file.write(b"1")
    assert of(folder) != before


def test_a_hub_id_counts_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    place, seen = tmp_path / "models--owner--name", set()
    (place / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (place / "snapshots" / commit).mkdir(parents=True)
        (place / "snapshots" / commit / "config.json").write_text("{}")
        (place / "refs" / "main").write_text(commit)
        seen.add(fingerprint(find_model("owner/name")))
    assert len(seen) == 2
    with pytest.raises(AdaPrunerError, match="owner/other"):
        fingerprint(find_model("owner/other"))
