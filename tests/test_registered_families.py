"""Families that do not come with the package, from a user's YAML file to a checkpoint that loads anywhere."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from adapruner.base.errors import AdaPrunerError
from adapruner.checkpoint import save_checkpoint
from adapruner.families import learn, open_model
from adapruner.model import architecture as _architecture
from adapruner.model.architecture import known_architectures, register_architectures
from adapruner.model.loading import load_model
from adapruner.model.places import find_model
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from run_helpers import exit_code
from tiny_families import random_plan

OLMO = """
model_type: olmo
layers: model.layers
attention:
  inputs:
    self_attn.q_proj: [query]
    self_attn.k_proj: [key]
    self_attn.v_proj: [value]
  output: self_attn.o_proj
feed_forward:
  inputs:
    mlp.gate_proj: [channels]
    mlp.up_proj: [channels]
  output: mlp.down_proj
config_fields:
  heads: num_attention_heads
  key_value_heads: num_key_value_heads
  channels: intermediate_size
"""
PHI = (
    OLMO.replace("olmo", "phi")
    .replace("o_proj", "dense")
    .replace("    mlp.gate_proj: [channels]\n    mlp.up_proj:", "    mlp.fc1:")
    .replace("down_proj", "fc2")
    + "fixed_attention_width: true\n"
)

ELSEWHERE = """
import sys
sys.modules["adapruner"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    for place in (folder + "/pruned", folder + "/again"):
        model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
        expected = torch.load(folder + "/logits.pt")
        torch.testing.assert_close(model(torch.arange(3, 40).view(1, -1)).logits, expected, rtol=0, atol=0)
        model.save_pretrained(folder + "/again")
"""


def tiny(model_type: str) -> PreTrainedModel:
    sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 24}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 3, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, pad_token_id=0, **sizes)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_families_are_pruned_saved_and_loaded(tokenizer, tmp_path):
    folders = [tmp_path / "olmo", tmp_path / "phi"]
    for folder, text in zip(folders, (OLMO, PHI), strict=True):
        prune_save_and_load(folder, text, tokenizer)
    finished = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, folders)],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PATH": ""},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    for folder in folders:
        assert (folder / "again" / "modeling_pruned.py").read_text().count("\nregister_family(") == 1
        # Where the file is not at hand, the same is inferred.
        _architecture._registered.pop(folder.name)
        loaded = open_model(find_model(str((folder / "pruned").rename(folder / "moved"))))
        assert torch.equal(loaded(torch.arange(3, 40).view(1, -1)).logits, torch.load(folder / "logits.pt"))


def prune_save_and_load(tmp_path: Path, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model of the family that the folder is named after, with a file for the family."""
    model_type = tmp_path.name
    (tmp_path / "families").mkdir(parents=True)
    (tmp_path / "families" / "own.yaml").write_text(text)
    model = tiny(model_type)
    learn(model.config)
    inferred = build_structure(model)
    for _ in range(2):
        assert register_architectures(tmp_path / "families") == [model_type]
    structure = build_structure(model)
    assert [block.groups for block in structure.blocks] == [block.groups for block in inferred.blocks]
    plan = random_plan(structure, [max(1, block.groups - block.layer) for block in structure.blocks])
    pruned = prune_model(model, structure, plan)
    folder, tokens = tmp_path / "pruned", torch.arange(3, 40).view(1, -1)
    save_checkpoint(pruned, tokenizer, folder)
    with torch.no_grad():
        logits = pruned(tokens).logits
        for layer_wise in (False, True):
            loaded = load_model(find_model(str(folder)), layer_wise=layer_wise)
            assert torch.equal(loaded(tokens).logits, logits)
    torch.save(logits, tmp_path / "logits.pt")
    load_model(find_model(str(folder))).save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_type: [", "cannot be read"),
        ("a: &a [1]\nb: *a", "alias"),
        ("7", "describes no family"),
        (OLMO.replace("  output: self_attn.o_proj\n", ""), r"attention\.output: "),
        (OLMO + "wings: 2\n", "wings: "),
        (OLMO.replace("[query]", "[questions]"), "query"),
        (OLMO.replace("olmo", "llama") + "learned_positions: true\n", "another description of 'llama'"),
        (OLMO.replace("olmo", "unheard-of"), "no causal language model 'unheard-of'"),
    ],
)
def test_descriptions_that_are_none(text, message, tmp_path):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(AdaPrunerError, match=message) as refusal:
        register_architectures(tmp_path / "own.yaml")
    assert "\n" not in str(refusal.value)
    assert "olmo" not in known_architectures()


def test_no_descriptions_at_all(tmp_path):
    with pytest.raises(AdaPrunerError, match=r"no \.yaml file"):
        register_architectures(tmp_path)
    with pytest.raises(AdaPrunerError, match="cannot be read"):
        register_architectures(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OLMO, ""),
        (OLMO.replace("    mlp.up_proj: [channels]\n", ""), "the description of olmo in"),
        (PHI, "describes phi, not olmo"),
    ],
)
def test_inspect_checks_a_description(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_architecture, "_registered", {})
    tiny("olmo").config.save_pretrained(tmp_path)
    file = tmp_path / "own.yaml"
    file.write_text(text)
    code = exit_code(["inspect", str(tmp_path), "--architectures", str(file)])
    shown = capsys.readouterr()
    assert code == (2 if message else 0)
    assert message in shown.err
    assert message or "olmo" in shown.out
