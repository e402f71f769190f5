"""What a run does that is given a model, a text and a ratio alone: other tests set options for speed."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import adapruner
from adapruner.checkpoint import save_checkpoint
from adapruner.families.inference import random_model
from conftest import write_paragraphs
from run_helpers import byte_tokenizer
from test_codes import METHODS, in_codes
from tiny_families import tiny_config

KINDS = ("dense", "fewer tokens", "bfloat16 mixture", "fp8", "mxfp4")


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def dtypes_of(folder: Path) -> Counter[torch.dtype]:
    return Counter(tensor.dtype for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tokenizer, tmp_path):
    if kind in ("dense", "fewer tokens"):
        own = byte_tokenizer(size=512) if kind == "fewer tokens" else tokenizer
        config = tiny_config("llama", hidden_size=64, intermediate_size=256, vocab_size=512)
        save_checkpoint(random_model(config), own, tmp_path / kind)
        return tmp_path / kind
    family = "gpt_oss" if kind == "mxfp4" else "qwen3_moe"
    config = tiny_config(family)
    if family == "qwen3_moe":
        config.hidden_size = config.moe_intermediate_size = 256
    save_checkpoint(random_model(config).bfloat16(), tokenizer, tmp_path / "numbers")
    if kind == "bfloat16 mixture":
        return tmp_path / "numbers"
    return in_codes(tmp_path / "numbers", tmp_path / "codes", METHODS[family])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Long enough for windows of 128 tokens."""
    return write_paragraphs(tmp_path_factory.mktemp("texts") / "long.txt", 420, words=130)


def test_a_run_with_default_options(kind, folder, text, tmp_path, capsys):
    """It is smaller by what was asked, in the dtype of the original, and is loaded; codes are left as they are."""
    options = {"fewer tokens": {"ratio": 0.2, "vocabulary_size": 320}, "dense": {"ratio": 0.1}}
    own = options.get(kind, {"ratio": 0.195, "layout": "uniform"})
    run = adapruner.prune(str(folder), str(text), output=tmp_path / "run", **own)
    assert run.result.removed_share == pytest.approx(own["ratio"], abs=0.005)
    assert size_of(run.model_folder) < size_of(folder)
    assert {*dtypes_of(run.model_folder)} <= {*dtypes_of(folder)}
    notes = capsys.readouterr().err
    config = json.loads((run.model_folder / "config.json").read_text())
    if kind in ("fp8", "mxfp4"):
        assert run.result.healing is None
        assert "is not trained after the cut: its weights are copied in FP8 or MXFP4" in notes
        assert config["quantization_config"] == json.loads((folder / "config.json").read_text())["quantization_config"]
    else:
        assert run.result.healing is not None
        assert "quantization_config" not in config
    if kind in ("dense", "bfloat16 mixture"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(run.model_folder, trust_remote_code=True)
        assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert (run.output / "report.html").stat().st_size > 10_000
