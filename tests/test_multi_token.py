"""Multi-token prediction heads: further layers in the files of a model, which are not in the pruned model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.families.inference import random_model
from adapruner.model.config import load_config
from adapruner.model.places import find_model
from adapruner.model.stored import has_multi_token_head
from run_helpers import QUICK
from tiny_families import tiny_config

LAYERS = 12


def make_base(folder: Path, family: str, layer: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes a tiny model with a copy of its last layer as the head, as the released models of the family name it."""
    random_model(tiny_config(family, num_hidden_layers=LAYERS, num_nextn_predict_layers=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state, last = load_file(folder / "model.safetensors"), f"model.layers.{LAYERS - 1}."
    head = {name.replace(last, layer): torch.ones_like(state[name]) for name in state if name.startswith(last)}
    assert head
    save_file(state | head, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("family", "layer"), [("qwen3", "mtp.layers.0."), ("deepseek_v3", f"model.layers.{LAYERS}.")])
def test_a_head_is_left_out_and_the_card_says_so(family, layer, tokenizer, text_file, tmp_path):
    make_base(tmp_path / "base", family, layer, tokenizer)
    result = adapruner.prune(tmp_path / "base", str(text_file), output=tmp_path / "run", **QUICK | {"ratio": 0.16})
    assert "it is not in this model" in (result.model_folder / "README.md").read_text()
    location = find_model(str(result.model_folder))
    assert not has_multi_token_head(location, load_config(location))
    _, report = AutoModelForCausalLM.from_pretrained(
        result.model_folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values())


def test_a_model_without_a_head_has_no_such_line(finished):
    assert "Multi-token" not in (finished.model_folder / "README.md").read_text()


def test_layers_beyond_those_that_the_config_counts_are_refused(tokenizer, tmp_path):
    make_base(tmp_path, "deepseek_v3", f"model.layers.{LAYERS}.", tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(AdaPrunerError, match=rf"model.layers.{LAYERS}.* has no place in the model"):
        adapruner.load(tmp_path)
