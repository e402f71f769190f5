"""Run folders of released versions are resumed and reported; `python tests/test_upgrades.py` adds that of this one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adapruner
from adapruner.evaluation import _writing
from adapruner.testing import tiny_texts, tiny_tokenizer
from run_helpers import exit_code, prune_command, stages_done

FOLDERS = Path(__file__).parent / "data" / "releases"
VERSIONS = sorted(path.name for path in FOLDERS.iterdir()) if FOLDERS.is_dir() else []
OPTIONS = {
    "ratio": 0.1,
    "pool": 4,
    "samples": 2,
    "objective_windows": 4,
    "final_windows": 2,
    "seq_len": 8,
    "trials": 5,
    "round_to": 1,
    "compensation_windows": 8,
    "self_windows": 2,
    "tune_scales": False,
}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(params=VERSIONS)
def release(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model, the text and the run of a version, as if all were made where it is."""
    monkeypatch.setattr("adapruner.calibration._sources._registered", {})
    release = Path(shutil.copytree(FOLDERS / request.param, tmp_path / "release"))
    config = release / "run/config.yaml"
    config.write_text(re.sub(r"/\S+/release/", f"{release}/", config.read_text()))
    return release


def command(release: Path, **changes: object) -> list[str]:
    options = OPTIONS | {"sources": release / "sources.yaml"}
    return prune_command(release / "model", release / "run", "released", options, **changes)


def numbers(run: Path) -> dict[str, object]:
    result = json.loads((run / "result.json").read_text())
    return {name: result[name] for name in ("plan_hash", "models", "windows", "levelled")}


def test_this_version_is_kept_once_it_is_released() -> None:
    assert adapruner.__version__ in VERSIONS


def test_a_run_of_a_release_is_resumed_or_refused_in_one_line(
    release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = release / "run"
    before, stages = numbers(run), stages_done(run)
    code = exit_code(command(release))
    said = capsys.readouterr().err.splitlines()
    if code == 2:
        assert "holds a run of another configuration (" in said[-1]
        assert exit_code(command(release, overwrite=True)) == 0
    else:
        assert code == 0
        assert numbers(run) == before
        # The page is not in the fixture; nothing else is done again.
        assert stages_done(run) == stages


def test_a_run_of_a_release_is_reported(release: Path) -> None:
    assert exit_code(["report", str(release / "run")]) == 0
    assert "<svg" in (release / "run/report.html").read_text()


def test_another_ratio_of_a_run_of_a_release(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = exit_code(["plan", str(release / "run"), "--ratio", "0.2", "-o", str(release / "other")])
    assert code == 0 or "rerun the command of that run first" in capsys.readouterr().err.splitlines()[-1]


def main() -> None:
    """Writes the model, text and run of this version; where they were made is in the files of the run."""
    _writing._CONTINUED = 8
    made = Path("/var/tmp/adapruner/release")
    try:
        tokenizer = tiny_tokenizer()
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(made / "model")
        tokenizer.save_pretrained(made / "model")
        (made / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in tiny_texts(60)))
        sources = {"released": {"split": "train", "columns": ["text"], "local": {"train": "text.jsonl"}}}
        (made / "sources.yaml").write_text(json.dumps(sources))
        assert exit_code(command(made)) == 0
        for name in ("report.html", ".lock"):
            (made / "run" / name).unlink()
        shutil.rmtree(FOLDERS / adapruner.__version__, ignore_errors=True)
        shutil.copytree(made, FOLDERS / adapruner.__version__)
    finally:
        shutil.rmtree(made.parent)


if __name__ == "__main__":
    main()
