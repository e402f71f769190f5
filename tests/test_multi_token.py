"""Multi-token prediction heads: copied from the files of the base model into every checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import adapruner
from adapruner.checkpoint import save_checkpoint
from adapruner.errors import AdaPrunerError
from adapruner.families import open_model
from adapruner.families.tiny import random_model
from adapruner.models import find_model
from adapruner.planning import PruningPlan
from adapruner.structure import Structure, build_structure
from adapruner.surgery import pad_to_stock, prune_model
from adapruner.tokens import Vocabulary, VocabularySummary, cut_vocabulary
from run_helpers import QUICK
from tiny_families import random_plan, tiny_config

LAYERS, HIDDEN, VOCABULARY = 12, 64, 256
# The tensors of the head beside its decoder layer, and where they are stored.
NUMBERED = {
    **dict.fromkeys(("enorm.weight", "hnorm.weight", "shared_head.norm.weight"), (HIDDEN,)),
    "eh_proj.weight": (HIDDEN, 2 * HIDDEN),
    **dict.fromkeys(("embed_tokens.weight", "shared_head.head.weight"), (VOCABULARY, HIDDEN)),
}
NAMED = {
    **dict.fromkeys(("pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "norm.weight"), (HIDDEN,)),
    "fc.weight": (HIDDEN, 2 * HIDDEN),
}


def make_base(folder: Path, family: str, tokenizer: PreTrainedTokenizerFast, **fields: object) -> dict[str, Tensor]:
    """Writes a tiny model with a head, as the released models of the family have it; returns the tensors of the head,
    by their names in the files."""
    config = tiny_config(family, num_hidden_layers=LAYERS, num_nextn_predict_layers=1, **fields)
    random_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    last = f"model.layers.{LAYERS - 1}."
    if family == "deepseek_v3":
        layer, beside = (
            f"model.layers.{LAYERS}.",
            {f"model.layers.{LAYERS}.{name}": NUMBERED[name] for name in NUMBERED},
        )
    else:
        layer, beside = "mtp.layers.0.", {f"mtp.{name}": NAMED[name] for name in NAMED}
    shapes = {name.replace(last, layer): tensor.shape for name, tensor in state.items() if name.startswith(last)}
    generator = torch.Generator().manual_seed(0)
    head = {name: torch.randn(shape, generator=generator) / 8 for name, shape in (shapes | beside).items()}
    save_file(state | head, folder / "model.safetensors", {"format": "pt"})
    return head


def mellum(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """A mixture with full attention in all layers, from which transformers can draft tokens."""
    full = {"layer_types": ["full_attention"] * LAYERS, "mtp_layer_types": ["full_attention"]}
    return make_base(folder, "mellum", tokenizer, **full)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors that the index of a folder lists."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert files.keys() == {file.name for file in folder.glob("*.safetensors")}
    tensors = {name: files[file][name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


def assert_head(folder: Path, head: dict[str, Tensor]) -> None:
    tensors = tensors_in(folder)
    assert head.keys() <= tensors.keys()
    for name, tensor in head.items():
        assert torch.equal(tensors[name], tensor), name
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1


def load_stock(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, without a complaint."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values())
    return model.eval()


def assert_drafts(folder: Path) -> None:
    """Greedy text is the same with and without the head."""
    model, prompt = load_stock(folder), {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4)}
    texts = [model.generate(**prompt, max_new_tokens=24, do_sample=False, use_mtp=use) for use in (False, True)]
    assert torch.equal(*texts)


def plan_without(structure: Structure, layer: int, part: str) -> PruningPlan:
    """Removes a layer, or its attention."""
    removed = ("heads", "experts", "channels") if part == "layer" else ("heads",)
    return random_plan(
        structure,
        [0 if block.layer == layer and block.kind in removed else block.groups for block in structure.blocks],
    )


@pytest.mark.parametrize("part", ["layer", "attention"])
def test_a_head_is_in_every_checkpoint_and_drafts(
    part: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = mellum(tmp_path / "base", tokenizer)
    assert_drafts(tmp_path / "base")
    dense = open_model(find_model(str(tmp_path / "base")))
    structure = build_structure(dense)
    pruned = prune_model(dense, structure, plan_without(structure, 5, part))
    capsys.readouterr()
    save_checkpoint(pruned, tokenizer, tmp_path / "pruned", shard_size="40KB")
    assert f"{len(head)} tensors of a multi-token prediction head were copied" in capsys.readouterr().err
    assert len(list((tmp_path / "pruned").glob("model-mtp-*.safetensors"))) > 1
    adapruner.export(tmp_path / "pruned", "stock", tmp_path / "stock")
    for folder in (tmp_path / "pruned", tmp_path / "stock"):
        assert_head(folder, head)
        assert_drafts(folder)
    layers = load_stock(tmp_path / "stock").config.num_hidden_layers
    assert layers == (LAYERS - 1 if part == "layer" else LAYERS)


def test_a_run_and_its_recovery_copy_the_head(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = mellum(tmp_path / "base", tokenizer)
    result = adapruner.prune(tmp_path / "base", str(text_file), output=tmp_path / "run", **QUICK | {"ratio": 0.18})
    said = f"{len(head)} tensors of a multi-token prediction head were copied"
    assert said in capsys.readouterr().err
    assert said in (result.model_folder / "README.md").read_text()
    short = {"seq_len": 16, "steps": 1, "records": 8, "batch_size": 2, "micro_batch_size": 2}
    adapruner.recover(result.model_folder, str(text_file), tmp_path / "recovered", **short)
    assert said in (tmp_path / "recovered" / "README.md").read_text()
    for folder in (result.model_folder, tmp_path / "recovered"):
        assert_head(folder, head)
        load_stock(folder)


def test_a_head_that_is_numbered_as_a_layer_follows_the_last_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """vLLM and SGLang look for layer `num_hidden_layers`."""
    head = make_base(tmp_path / "base", "deepseek_v3", tokenizer)
    dense = open_model(find_model(str(tmp_path / "base")))
    structure = build_structure(dense)
    save_checkpoint(prune_model(dense, structure, plan_without(structure, 5, "layer")), tokenizer, tmp_path / "fewer")
    loaded = adapruner.load(tmp_path / "fewer")
    assert loaded.config.num_hidden_layers == LAYERS - 1
    renumbered = {name.replace(f".{LAYERS}.", f".{LAYERS - 1}."): tensor for name, tensor in head.items()}
    assert_head(tmp_path / "fewer", renumbered)
    save_checkpoint(pad_to_stock(loaded), tokenizer, tmp_path / "again")
    assert tensors_in(tmp_path / "again").keys() == tensors_in(tmp_path / "fewer").keys()


def test_layers_beyond_those_that_the_config_counts_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make_base(tmp_path, "deepseek_v3", tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(AdaPrunerError, match=rf"model.layers.{LAYERS}.* has no place in the model"):
        adapruner.load(tmp_path)


def test_a_head_loses_the_rows_of_removed_tokens(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = make_base(tmp_path / "base", "deepseek_v3", tokenizer)
    model, kept = open_model(find_model(str(tmp_path / "base"))), (0, 1, 2, 5, 250)
    summary = VocabularySummary(before=VOCABULARY, after=len(kept), occurring=1, counted_bytes=1)
    cut_vocabulary(model, Vocabulary(kept=kept, summary=summary))
    save_checkpoint(model, tokenizer, tmp_path / "fewer")
    assert "were copied, without the rows of removed tokens" in capsys.readouterr().err
    of_tokens = [name for name in head if name.endswith(("embed_tokens.weight", "shared_head.head.weight"))]
    assert len(of_tokens) == 2
    assert_head(tmp_path / "fewer", head | {name: head[name][list(kept)] for name in of_tokens})


def test_a_head_of_a_model_that_is_read_layer_by_layer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    head = make_base(tmp_path / "base", "qwen3", tokenizer)
    dense = open_model(find_model(str(tmp_path / "base")), layer_wise=True)
    structure = build_structure(dense)
    save_checkpoint(prune_model(dense, structure, plan_without(structure, 5, "layer")), tokenizer, tmp_path / "fewer")
    assert_head(tmp_path / "fewer", head)


def test_of_a_model_in_memory_nothing_is_copied(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mellum(tmp_path / "base", tokenizer)
    model = load_stock(tmp_path / "base")
    save_checkpoint(model, tokenizer, tmp_path / "saved")
    assert "multi-token" not in capsys.readouterr().err
    assert not any("mtp" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
