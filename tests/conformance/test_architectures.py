"""One suite over every known family: what is cut equals what is masked, and what is saved is what is loaded."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import adapruner
from adapruner.checkpoint import save_checkpoint
from adapruner.models import known_architectures
from adapruner.planning import PruningPlan, make_plan
from adapruner.structure import Structure, build_structure, count_parameters
from adapruner.surgery import prune_model

CASES = [
    (family, key_value_heads, granularity, tied)
    for family in known_architectures()
    for key_value_heads, granularity in ((3, "kv-group"), (3, "query-head"), (6, "kv-group"))
    for tied in (False, True)
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def dense_and_plan(
    request: pytest.FixtureRequest, make_model: Callable[..., PreTrainedModel]
) -> tuple[PreTrainedModel, Structure, PruningPlan]:
    family, key_value_heads, granularity, tied = request.param
    model = make_model(family, key_value_heads, tie_word_embeddings=tied)
    structure = build_structure(model, granularity)
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(3))
    # A different cut in every layer: the first stays whole, the last keeps one group (per stratum) of each kind.
    counts = []
    for block in structure.blocks:
        per_stratum = block.groups // block.strata
        counts.append(block.strata * max(1, per_stratum - block.layer * per_stratum // 3))
    return model, structure, make_plan(structure, scores, counts)


def masked(model: PreTrainedModel, structure: Structure, plan: PruningPlan) -> PreTrainedModel:
    """The dense model in which nothing that a removed group computes is read: an independent way to remove it."""
    model = copy.deepcopy(model)
    for block, kept in zip(structure.blocks, plan.blocks, strict=True):
        read_by = {"heads": "self_attn.o_proj", "channels": "mlp.down_proj"}[block.kind]
        weight = model.get_submodule(f"model.layers.{block.layer}.{read_by}").weight
        width = weight.shape[1] // block.groups
        for group in set(range(block.groups)) - set(kept.kept):
            weight.data[:, group * width : (group + 1) * width] = 0
    return model


def test_pruned_equals_masked(
    dense_and_plan: tuple[PreTrainedModel, Structure, PruningPlan], windows: torch.Tensor
) -> None:
    model, structure, plan = dense_and_plan
    before = copy.deepcopy(model.state_dict())
    pruned = prune_model(model, structure, plan)
    torch.testing.assert_close(
        pruned(windows).logits, masked(model, structure, plan)(windows).logits, rtol=1e-4, atol=1e-4
    )
    assert count_parameters(pruned) == count_parameters(model) - plan.removed_parameters
    assert plan.removed_parameters > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"pruning changed {name} of the dense model"


def test_saved_is_loaded_and_generates(
    dense_and_plan: tuple[PreTrainedModel, Structure, PruningPlan],
    windows: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model, structure, plan = dense_and_plan
    pruned = prune_model(model, structure, plan)
    expected = pruned(windows).logits
    save_checkpoint(pruned, tokenizer, tmp_path / "first")
    loaded = adapruner.load(tmp_path / "first")
    assert torch.equal(loaded(windows).logits, expected)
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied == model.config.tie_word_embeddings

    save_checkpoint(loaded, tokenizer, tmp_path / "second")
    again = adapruner.load(tmp_path / "second")
    assert torch.equal(again(windows).logits, expected)

    prompt = {"input_ids": windows[:2], "attention_mask": torch.ones_like(windows[:2])}
    greedy = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    with_cache = loaded.generate(**prompt, **greedy, use_cache=True)
    assert torch.equal(with_cache, loaded.generate(**prompt, **greedy, use_cache=False))
    loaded.set_attn_implementation("eager")
    torch.testing.assert_close(loaded(windows).logits, expected, rtol=1e-4, atol=1e-4)


REMOTE_CODE = """
import sys
sys.modules["adapruner"] = None  # as if it were not installed
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
expected = torch.load(folder + "/../expected.pt", weights_only=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(model(expected["windows"]).logits, expected["logits"])
decoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(decoder(expected["windows"]).last_hidden_state, expected["hidden"])
assert len(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)) == expected["vocabulary"]
greedy = dict(attention_mask=torch.ones(2, 12), do_sample=False, max_new_tokens=8, min_new_tokens=8)
with_cache = model.generate(expected["windows"][:2], use_cache=True, **greedy)
assert torch.equal(with_cache, model.generate(expected["windows"][:2], use_cache=False, **greedy))
model.save_pretrained(folder + "/../again")
again = AutoModelForCausalLM.from_pretrained(folder + "/../again", trust_remote_code=True)
assert torch.equal(again(expected["windows"]).logits, expected["logits"])
"""


@pytest.mark.parametrize("family", known_architectures())
def test_loads_without_the_package(
    family: str,
    make_model: Callable[..., PreTrainedModel],
    windows: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = make_model(family)
    structure = build_structure(model)
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(4))
    counts = [max(1, block.groups - block.layer) for block in structure.blocks]
    pruned = prune_model(model, structure, make_plan(structure, scores, counts))
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    with torch.no_grad():
        expected = {
            "windows": windows,
            "logits": pruned(windows).logits,
            "hidden": pruned.model(windows).last_hidden_state,
            "vocabulary": len(tokenizer),
        }
    torch.save(expected, tmp_path / "expected.pt")
    finished = subprocess.run(
        [sys.executable, "-c", REMOTE_CODE, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PATH": ""},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr


def test_a_pruned_model_can_be_pruned_again(model: PreTrainedModel, windows: torch.Tensor) -> None:
    structure = build_structure(model)
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(5))
    once = prune_model(
        model, structure, make_plan(structure, scores, [b.groups - (b.layer > 1) for b in structure.blocks])
    )
    structure = build_structure(once)
    plan = make_plan(structure, scores[: structure.group_offsets[-1]], [b.groups - 1 for b in structure.blocks])
    twice = prune_model(once, structure, plan)
    torch.testing.assert_close(
        twice(windows).logits, masked(once, structure, plan)(windows).logits, rtol=1e-4, atol=1e-4
    )
