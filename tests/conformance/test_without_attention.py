"""Whole attention layers that are removed."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from adapruner.base.errors import AdaPrunerError
from adapruner.budget.counts import Budget, Profile, kept_counts
from adapruner.budget.plan import PruningPlan
from adapruner.checkpoint import save_checkpoint
from adapruner.families.proof import failed_without_attention, masked
from adapruner.model.architecture import known_architectures, using_architecture
from adapruner.model.loading import load_model
from adapruner.model.places import find_model
from adapruner.structure.blocks import Structure, count_parameters
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from tiny_families import random_plan


def planned(structure: Structure, *layers: int) -> PruningPlan:
    """A plan that removes the attention of some layers, and some of all others."""
    counts = kept_counts(structure, Budget(0.2, Profile(0, 0), heads=0.5))
    gone = [block.layer in layers and block.kind == "heads" for block in structure.blocks]
    return random_plan(structure, [0 if whole else count for whole, count in zip(gone, counts, strict=True)])


@pytest.mark.parametrize("model_type", known_architectures())
def test_a_family_can_lose_attention_if_it_says_so(model_type, make_model):
    architecture = known_architectures()[model_type]
    refusal = failed_without_attention(make_model(model_type), architecture.changed(removable_attention=True))
    assert (refusal is None) == architecture.removable_attention, refusal


def test_a_layer_without_attention_has_no_cache(make_model, windows, tokenizer, tmp_path):
    dense = make_model("llama")
    structure = build_structure(dense)
    plan = planned(structure, 0, 2)
    pruned = prune_model(dense, structure, plan)
    assert count_parameters(pruned) == plan.total_parameters - plan.removed_parameters
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    cache = DynamicCache(config=loaded.config)
    with torch.no_grad(), masked(dense, structure, plan) as same:
        # Before 5.24, transformers has another name for it.
        name = "cache" if "cache" in inspect.signature(loaded.forward).parameters else "past_key_values"
        logits = loaded(windows, use_cache=True, **{name: cache}).logits
        torch.testing.assert_close(logits, same(windows).logits, rtol=1e-3, atol=1e-4)
    used = [layer for layer in cache.layers if layer.is_initialized]
    assert len(used) == 2
    assert cache.get_seq_length() == windows.shape[1]


@pytest.mark.parametrize(("model_type", "kind"), [("bloom", "heads"), ("llama", "channels")])
def test_no_plan_removes_what_a_family_needs(model_type, kind, make_model, tmp_path):
    """The attention of BLOOM adds the hidden state itself: without it, that is lost."""
    model = make_model(model_type)
    structure = build_structure(model)
    counts = [0 if block.layer == 1 and block.kind == kind else block.groups for block in structure.blocks]
    with pytest.raises(AdaPrunerError, match=rf"of layer 1 of this {model_type} cannot be removed whole"):
        random_plan(structure, counts)
    whole = random_plan(structure, [block.groups for block in structure.blocks])
    blocks = [
        block.model_copy(update={"kept": block.kept[:count]}) for block, count in zip(whole.blocks, counts, strict=True)
    ]
    plan = whole.model_copy(update={"blocks": tuple(blocks)})
    with pytest.raises(AdaPrunerError, match="cannot be removed whole"):
        prune_model(model, structure, plan)
    if kind == "channels":
        return
    # A checkpoint that another description allowed.
    with using_architecture(known_architectures()[model_type].changed(removable_attention=True)):
        prune_model(model, build_structure(model), plan).save_pretrained(tmp_path / "model")
    with pytest.raises(AdaPrunerError, match=rf"layer 1 has no attention, without which no {model_type} works"):
        load_model(find_model(str(tmp_path / "model")))
