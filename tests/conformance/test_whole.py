"""Whole attentions, feed-forwards and layers that are removed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from adapruner.checkpoint import save_checkpoint
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import window_losses
from adapruner.families import learn, resolve
from adapruner.families.proof import masked, why_not_whole
from adapruner.families.tiny import random_model, tiny_config
from adapruner.measurement import measure_moments
from adapruner.models import Whole, find_model, known_architectures, load_model, using_architecture
from adapruner.planning import Budget, BudgetError, Profile, PruningPlan, kept_counts
from adapruner.search import RemovalOrders, removal_orders
from adapruner.structure import Structure, build_structure, count_parameters
from adapruner.surgery import Compensation, prune_model, refit_sequentially
from tiny_families import random_plan

WHOLE: tuple[Whole, ...] = ("attention", "feed-forward", "layer")


def planned(structure: Structure, **budget: object) -> PruningPlan:
    return random_plan(structure, kept_counts(structure, Budget(0.4, Profile(0, 0), **budget)))  # type: ignore[arg-type]  # any field


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("model_type", known_architectures())
def test_what_a_family_says_can_go_whole_is_what_can(
    model_type: str, whole: Whole, make_model: Callable[..., PreTrainedModel]
) -> None:
    architecture = known_architectures()[model_type]
    refusal = why_not_whole(make_model(model_type), architecture.changed(whole=WHOLE), whole)
    assert (refusal is None) == (whole in architecture.whole), refusal


def test_a_layer_without_attention_has_no_cache(
    make_model: Callable[..., PreTrainedModel],
    windows: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    dense = make_model("llama")
    structure = build_structure(dense)
    plan = planned(structure, without_attention=(0, 2), without_feed_forward=(1,), heads=0.5)
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


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_a_uniform_model_with_fewer_layers_is_a_stock_model(
    model_type: str, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dense = make_model(model_type)
    structure = build_structure(dense)
    counts = [0 if block.layer == 1 else block.groups - 2 * (block.kind == "channels") for block in structure.blocks]
    plan = random_plan(structure, counts)
    pruned = prune_model(dense, structure, plan)
    assert type(pruned) is type(dense)
    assert pruned.config.num_hidden_layers == 3
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.py"))
    stock, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), torch.arange(5, 25)[None]
    with torch.no_grad(), masked(dense, structure, plan) as same:
        torch.testing.assert_close(stock(tokens).logits, same(tokens).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("glm4_moe", {"first_k_dense_replace": 1}), ("qwen2_moe", {"mlp_only_layers": [0, 2], "decoder_sparse_step": 1})],
)
def test_layers_are_named_by_their_new_numbers(model_type: str, fields: dict[str, object], layer: int) -> None:
    """The first layers of these mixtures have no experts."""
    config = tiny_config(AutoConfig.for_model(model_type, **fields))
    learn(config)
    dense, tokens = random_model(config), torch.arange(5, 25)[None]
    structure = build_structure(dense)
    assert structure.removable_layers == [0, 1, 2, 3]
    counts = [0 if block.layer == layer else block.groups for block in structure.blocks]
    plan = random_plan(structure, counts)
    pruned = prune_model(dense, structure, plan)
    with torch.no_grad(), masked(dense, structure, plan) as same:
        torch.testing.assert_close(pruned(tokens).logits, same(tokens).logits, rtol=1e-3, atol=1e-4)


def test_layers_that_compute_by_their_numbers_stay(make_model: Callable[..., PreTrainedModel]) -> None:
    assert build_structure(make_model("gpt2")).whole == set(WHOLE)
    scaled = build_structure(make_model("gpt2", scale_attn_by_inverse_layer_idx=True))
    assert scaled.whole == {"attention", "feed-forward"}
    assert scaled.removable_layers == []


def test_layers_are_proven_from_the_first_on() -> None:
    """Jamba's config gives the periods of its kinds of layers, which another number of layers does not keep."""
    config = tiny_config(AutoConfig.for_model("jamba"))
    assert resolve(config).whole == ("attention", "feed-forward")


def test_an_order_ends_where_no_loss_is_finite(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_model("llama")
    losses = iter([math.nan, 2.0, 3.0, 4.0, math.inf, math.nan])
    batch = (torch.full((1,), each) for each in losses)
    monkeypatch.setattr("adapruner.search._whole.losses_by_batch", lambda *_, **__: [next(batch)])
    orders = removal_orders(dense, build_structure(dense), windows, {"attention": range(3)})
    assert orders.layers["attention"] == (1, 2)
    assert RemovalOrders.model_validate_json(orders.model_dump_json()) == orders


def test_what_cannot_go_whole_is_refused(make_model: Callable[..., PreTrainedModel]) -> None:
    llama, bloom = build_structure(make_model("llama")), build_structure(make_model("bloom"))
    for structure, budget in (
        (bloom, Budget(0.2, Profile(0, 0), without_attention=(1,))),
        (llama, Budget(0.2, "uniform", without_feed_forward=(2,))),
    ):
        with pytest.raises(BudgetError, match=r"of layer \d of this \w+ cannot be removed whole"):
            kept_counts(structure, budget)


@pytest.mark.parametrize(("model_type", "kind"), [("bloom", "heads"), ("bloom", "channels"), ("opt", "channels")])
def test_no_plan_removes_what_a_family_needs(
    model_type: str, kind: str, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """The modules of BLOOM add the hidden state themselves: without one of them, it is lost."""
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
    if model_type == "opt":  # whose layers are the module of their feed-forward
        return
    # A checkpoint of earlier versions.
    with using_architecture(known_architectures()[model_type].changed(whole=WHOLE)):
        prune_model(model, build_structure(model), plan).save_pretrained(tmp_path / "model")
    with pytest.raises(AdaPrunerError, match=rf"layer 1 has no \w+, without which no {model_type} works"):
        load_model(find_model(str(tmp_path / "model")))


def test_the_rest_of_the_ratio_comes_from_what_stays(make_model: Callable[..., PreTrainedModel]) -> None:
    structure = build_structure(make_model("llama"))
    for attention, feed_forward in ((2,), ()), ((), (1,)), ((1, 2), (2,)):
        budget = Budget(0.4, Profile(0, 0), heads=0.5, without_attention=attention, without_feed_forward=feed_forward)
        counts = kept_counts(structure, budget)
        assert abs(structure.removed_parameters(counts) / structure.total_parameters - 0.4) <= 0.005
        for block, count in zip(structure.blocks, counts, strict=True):
            gone = block.layer in (attention if block.kind == "heads" else feed_forward)
            assert (count == 0) == gone


@pytest.mark.parametrize("whole", WHOLE)
def test_the_order_is_the_greedy_one(
    whole: Whole, make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    """Compared with every model of one part less, really cut."""
    dense = make_model("llama")
    structure = build_structure(dense)
    orders = removal_orders(dense, structure, windows, {whole: range(4)})
    gone: list[int] = []
    for layer, loss in zip(orders.layers[whole][:3], orders.losses[whole][:3], strict=True):
        losses = {}
        for candidate in set(range(4)) - set(gone):
            parts = (*gone, candidate)
            kinds = {"attention": ("heads",), "feed-forward": ("channels",)}.get(whole, ("heads", "channels"))
            counts = [0 if block.layer in parts and block.kind in kinds else block.groups for block in structure.blocks]
            plan = random_plan(structure, counts)
            losses[candidate] = float(window_losses(prune_model(dense, structure, plan), windows).mean())
        assert layer == min(losses, key=losses.__getitem__)
        assert loss == pytest.approx(losses[layer], rel=1e-5)
        gone.append(layer)


def test_the_fit_layer_by_layer_makes_up_for_what_is_gone(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    dense = make_model("llama")
    structure = build_structure(dense)
    budget = Budget(0.45, Profile(0, 0), heads=0.5, without_attention=(0, 1), without_feed_forward=(1,))
    plan = random_plan(structure, kept_counts(structure, budget))
    compensation = Compensation("least-squares", dict(measure_moments(dense, structure, windows)))
    pruned = prune_model(dense, structure, plan, compensation)

    def distance() -> float:
        with torch.no_grad():
            states = [model.model(windows).last_hidden_state for model in (dense, pruned)]
        return float((states[0] - states[1]).norm())

    one_shot, before = distance(), {name: weight.clone() for name, weight in pruned.named_parameters()}
    refit_sequentially(dense, pruned, structure, plan, compensation, windows)
    assert distance() < 0.95 * one_shot
    refitted = [name for name, weight in pruned.named_parameters() if not weight.equal(before[name])]
    assert any(name.startswith("model.layers.2.") for name in refitted)
