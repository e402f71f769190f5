"""Budgets and plans against exhaustive counting on small structures."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter
from rich.console import Console
from transformers import LlamaConfig, Qwen3MoeConfig

from adapruner.errors import AdaPrunerError
from adapruner.families.inference import infer_architecture
from adapruner.models._architecture import remember_family
from adapruner.models._loading import empty_model
from adapruner.planning._budget import Budget, BudgetError, Profile, kept_counts, weigh_channels
from adapruner.planning._plan import PruningPlan, make_plan
from adapruner.structure._build import build_structure
from adapruner.surgery._cut import prune_model


@pytest.fixture(scope="module")
def llama_7b():
    """LLaMA-7B in shapes only."""
    return build_structure(empty_model(LlamaConfig()))


def test_sizes_of_llama_7b(llama_7b):
    assert llama_7b.total_parameters == 6_738_415_616
    heads, channels = llama_7b.blocks[:2]
    assert (heads.groups, heads.parameters_per_group) == (32, 4 * 128 * 4096)
    assert (channels.groups, channels.parameters_per_group) == (11008, 3 * 4096)


@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_and_what_can_be_removed_at_most(tied):
    """Against the names of the parameters, and a model with one KV group and one channel in each layer."""
    sizes = {"vocab_size": 90, "hidden_size": 48, "num_hidden_layers": 3, "head_dim": 8, "tie_word_embeddings": tied}
    widths = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 40}
    model = empty_model(LlamaConfig(**sizes, **widths))
    structure = build_structure(model)
    by_name = {"embed_tokens": "embedding", "lm_head": "embedding", "self_attn": "attention", "mlp": "feed-forward"}
    expected = dict.fromkeys(structure.parts, 0)
    for name, parameter in model.named_parameters():
        part = next((part for word, part in by_name.items() if word in name.split(".")), "other")
        expected[part] += parameter.numel()
    assert structure.parts == expected
    least = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 1}
    smallest = build_structure(empty_model(LlamaConfig(**sizes, **least)))
    assert structure.removable_parameters == structure.total_parameters - smallest.total_parameters


def test_equal_shares_are_those_of_llm_pruner(llama_7b):
    """25 % of heads and channels in layers 4 to 29 leave 5,422,977,024 parameters (arXiv 2305.11627)."""
    ratio = 1 - 5_422_977_024 / llama_7b.total_parameters
    counts = kept_counts(llama_7b, Budget(ratio, Profile(4, 2), heads=1))
    for block, count in zip(llama_7b.blocks, counts, strict=True):
        pruned = 4 <= block.layer < 30
        assert count == {"heads": 24 if pruned else 32, "channels": 8256 if pruned else 11008}[block.kind]
    assert llama_7b.total_parameters - llama_7b.removed_parameters(counts) == 5_422_977_024


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.35, 0.45])
@pytest.mark.parametrize("head_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("round_to", [1, 32, 256])
def test_the_ratio_is_met_and_widths_are_rounded(llama_7b, ratio, head_share, round_to):
    counts = kept_counts(llama_7b, Budget(ratio, Profile(4, 3), heads=head_share, round_to=round_to))
    assert abs(llama_7b.removed_parameters(counts) / llama_7b.total_parameters - ratio) <= 0.005
    for block, count in zip(llama_7b.blocks, counts, strict=True):
        if not 4 <= block.layer < 29:
            assert count == block.groups
        elif block.kind == "channels":
            assert count % round_to == 0
        elif head_share == 0:
            assert count == block.groups
    channels = [count for block, count in zip(llama_7b.blocks, counts, strict=True) if block.kind == "channels"][4:29]
    assert max(channels) - min(channels) <= round_to


def test_query_heads_go_in_equal_numbers_from_every_kv_group(make_model):
    structure = build_structure(make_model("llama"), "query-head")
    counts = kept_counts(structure, Budget(0.2, Profile(0, 0), heads=1))
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    plan = make_plan(structure, scores, counts)
    heads = [block for block in plan.blocks if block.kind == "heads"]
    assert any(len(block.kept) < block.groups for block in heads)
    for block in heads:
        per_group = [sum(head // 2 == group for head in block.kept) for group in range(3)]
        assert len(set(per_group)) == 1


def test_keeps_the_most_important_groups(model):
    structure = build_structure(model)
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    counts = [max(1, block.groups // 2) for block in structure.blocks]
    plan = make_plan(structure, scores, counts)
    for block, offset, count in zip(plan.blocks, structure.group_offsets, counts, strict=False):
        own = scores[offset : offset + block.groups]
        if block.kind == "heads":
            best = max(itertools.combinations(range(block.groups), count), key=lambda kept: own[list(kept)].sum())
            assert block.kept == best
        else:
            assert own[list(block.kept)].min() > own[[i for i in range(block.groups) if i not in block.kept]].max()


def test_same_input_same_hash_and_json_round_trip(model, tmp_path):
    structure = build_structure(model)
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    counts = [block.groups - 1 for block in structure.blocks]
    plan = make_plan(structure, scores, counts)
    assert plan.hash == make_plan(structure, scores.clone(), counts).hash
    assert plan.hash != make_plan(structure, 1 - scores, counts).hash
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert make_plan(structure, torch.ones_like(scores), counts).blocks[0].kept == (0, 1)  # ties: the earlier ones


def test_explain_names_every_layer(model):
    structure = build_structure(model)
    scores = torch.ones(structure.group_offsets[-1])
    plan = make_plan(structure, scores, kept_counts(structure, Budget(0.1, Profile(1, 1))))
    console = Console(width=120)
    with console.capture() as captured:
        console.print(plan.explain())
    text = captured.get()
    assert f"{plan.removed_parameters:,} of {plan.total_parameters:,}" in text
    assert "24 of 24" in text
    assert all(f"{len(block.kept)} of {block.groups}" in text for block in plan.blocks)


def test_an_impossible_ratio_names_the_largest(llama_7b):
    with pytest.raises(
        AdaPrunerError, match=r"0\.95 cannot be reached.* at most (0\.\d+) of the 6,738,415,616"
    ) as error:
        kept_counts(llama_7b, Budget(0.95))
    without_heads = float(str(error.value).split("at most ")[1].split()[0])
    with_heads = float(str(error.value).split("parameters can be removed, ")[1].split()[0])
    with pytest.raises(AdaPrunerError, match=r"at most 0\.5\d+ of .*, 0\.\d+ with equal shares"):
        kept_counts(llama_7b, Budget(0.7, heads=0.3))
    for largest, head_share in ((without_heads, 0.0), (with_heads, 1.0)):
        kept_counts(llama_7b, Budget(largest, heads=head_share))
        with pytest.raises(AdaPrunerError, match="cannot be reached"):
            kept_counts(llama_7b, Budget(largest + 0.01, heads=head_share))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(0.012, Profile(0, 3), round_to=8), "lower `round_to`"),
        (Budget(0.0001), "all 4 layers are protected"),
        (Budget(0.0001, Profile(0, 0)), "are more than that; raise `ratio`"),
        (Budget(0.0001, Profile(0, 0), round_to=8), "are more than that; lower `round_to` or raise `ratio`"),
        (Budget(0.9, Profile(0, 0)), r"a ratio of 0\.9 cannot be reached"),
    ],
)
def test_what_cannot_be_met_is_refused(budget, message, model):
    structure = build_structure(model)
    with pytest.raises(AdaPrunerError, match=message):
        kept_counts(structure, budget)


def test_a_budget_survives_json(llama_7b):
    """As part of the candidates in the files of a run."""
    adapter, profile = TypeAdapter(Budget), Budget(0.2, Profile(2, 1, 0.5), heads=0.5)
    weighed = weigh_channels(llama_7b, replace(profile, heads=(3,) * 32, without_attention=(1,)), (1.0,) * 32)
    for budget in (profile, weighed, Budget(0.2, "uniform", round_to=32)):
        assert adapter.validate_json(adapter.dump_json(budget)) == budget


def test_a_plan_fits_only_its_model(model, llama_7b):
    structure = build_structure(model)
    plan = make_plan(structure, torch.ones(structure.group_offsets[-1]), [b.groups for b in structure.blocks])
    with pytest.raises(AdaPrunerError, match="this plan is for a llama of"):
        plan.check_fits(llama_7b)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4])
@pytest.mark.parametrize(("tilt", "bend"), [(0.5, 0.0), (-0.5, 0.0), (0.0, 1.0), (0.3, -0.5)])
def test_a_depth_profile_says_how_shares_compare(llama_7b, ratio, tilt, bend):
    counts = kept_counts(llama_7b, Budget(ratio, Profile(4, 3, tilt=tilt, bend=bend), heads=0.5))
    assert abs(llama_7b.removed_parameters(counts) / llama_7b.total_parameters - ratio) <= 0.001
    shares = [1 - count / 11008 for b, count in zip(llama_7b.blocks, counts, strict=True) if b.kind == "channels"]
    assert not any(shares[:4] + shares[29:])
    profile = [math.exp(tilt * z - bend * z * z) for z in (i / 12 - 1 for i in range(25))]
    for layer in range(4, 29):
        if shares[layer] < 0.99:
            relative = shares[layer] / shares[16]
            assert math.isclose(relative, profile[layer - 4] / profile[12], rel_tol=0.01)


@pytest.mark.parametrize("head_share", [0.0, 0.5, 1.0])
def test_a_uniform_layout_is_the_same_in_every_layer(llama_7b, head_share):
    counts = kept_counts(llama_7b, Budget(0.3, "uniform", heads=head_share, round_to=32))
    assert abs(llama_7b.removed_parameters(counts) / llama_7b.total_parameters - 0.3) <= 0.005
    for kind in ("heads", "channels"):
        kept = {count for block, count in zip(llama_7b.blocks, counts, strict=True) if block.kind == kind}
        assert len(kept) == 1
        assert (kept == {32}) == (kind == "heads" and head_share == 0)


def test_a_uniform_layout_that_steps_over_the_ratio_is_refused(llama_7b):
    with pytest.raises(AdaPrunerError, match="lower `round_to`"):
        kept_counts(llama_7b, Budget(0.3, "uniform", round_to=1024))


def test_layers_that_differ_cannot_be_cut_alike(model):
    structure = build_structure(model)
    plan = make_plan(
        structure, torch.ones(structure.group_offsets[-1]), kept_counts(structure, Budget(0.1, Profile(1, 1)))
    )
    with pytest.raises(AdaPrunerError, match="differ already"):
        kept_counts(build_structure(prune_model(model, structure, plan)), Budget(0.05, "uniform"))


def test_heads_that_are_given_stay_and_channels_make_up_for_them(llama_7b):
    heads = tuple(32 if layer < 30 else 8 for layer in range(32))
    counts = kept_counts(llama_7b, Budget(0.2, Profile(4, 3), heads=heads, without_attention=(5,)))
    of_heads = [count for count, block in zip(counts, llama_7b.blocks, strict=True) if block.kind == "heads"]
    assert of_heads == [0 if layer == 5 else kept for layer, kept in enumerate(heads)]
    assert llama_7b.removed_parameters(counts) == pytest.approx(0.2 * llama_7b.total_parameters, rel=1e-3)
    of_channels = [count for count, block in zip(counts, llama_7b.blocks, strict=True) if block.kind == "channels"]
    assert {*of_channels[:4], *of_channels[-3:]} == {11_008}
    assert max(of_channels[4:-3]) < 11_008
    with pytest.raises(BudgetError, match=r"a ratio of 0.01 is not met: .* come to 0\.02"):
        kept_counts(llama_7b, Budget(0.01, heads=heads, without_attention=(5,)))


def test_shares_take_the_place_of_the_profile(llama_7b):
    budget = Budget(0.2, Profile(4, 3, bend=0.8), heads=0.5)
    counts = kept_counts(llama_7b, budget)
    channels = {number: block for number, block in enumerate(llama_7b.blocks) if block.kind == "channels"}
    same = tuple(1 - counts[number] / block.groups for number, block in channels.items())
    by_shares = kept_counts(llama_7b, weigh_channels(llama_7b, budget, same))
    for number, (before, after) in enumerate(zip(counts, by_shares, strict=True)):
        # As whole channels are what was rounded to shares.
        assert abs(before - after) <= (2 if number in channels else 0)
    # Twice the share of a layer takes twice as many of its channels as of the others, protected or not.
    twice = kept_counts(llama_7b, weigh_channels(llama_7b, Budget(0.1), (2.0, *[1.0] * 30, 0.0)))
    gone = [block.groups - twice[number] for number, block in channels.items()]
    assert gone[0] == pytest.approx(2 * gone[1], abs=2)
    assert gone[-1] == 0
    assert abs(llama_7b.removed_parameters(twice) / llama_7b.total_parameters - 0.1) <= 0.005


@pytest.mark.parametrize("ratio", [0.1, 0.3])
@pytest.mark.parametrize("head_share", [0.0, 1.0])
def test_layers_without_a_share_stay_whole(ratio, head_share):
    """Also where their width is no multiple of what widths are rounded to."""
    sizes = {"vocab_size": 96, "hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 1100}
    structure = build_structure(empty_model(LlamaConfig(num_hidden_layers=8, **sizes)))
    shares = (0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0)
    budget = Budget(ratio, Profile(2, 1), heads=head_share, round_to=64)
    counts = kept_counts(structure, weigh_channels(structure, budget, shares))
    widths = [count for block, count in zip(structure.blocks, counts, strict=True) if block.kind == "channels"]
    assert {*widths[:2], widths[7]} == {1100}
    assert max(widths[2:7]) < 1100
    assert {width % 64 for width in widths[2:7]} == {0}
    assert abs(structure.removed_parameters(counts) / structure.total_parameters - ratio) <= 0.005


def test_heads_give_up_as_many_whichever_layers_share_the_channels():
    sizes = {"vocab_size": 96, "hidden_size": 512, "num_attention_heads": 16, "intermediate_size": 1536}
    structure = build_structure(empty_model(LlamaConfig(num_hidden_layers=12, **sizes)))
    left = []
    for last in (6, 9, 10):
        shares = tuple(0.3 if 2 <= layer < last else 0.0 for layer in range(12))
        counts = kept_counts(structure, weigh_channels(structure, Budget(0.15, Profile(2, 2), heads=0.5), shares))
        left.append([count for block, count in zip(structure.blocks, counts, strict=True) if block.kind == "heads"])
    assert sum(left[0]) < 12 * 16
    assert left[0] == left[1] == left[2]


@pytest.mark.parametrize("ratio", [0.04, 0.14, 0.23])
def test_more_can_be_reached_than_a_ratio_between_whole_experts(ratio):
    """As well where it is given how many heads stay."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3MoeConfig(
        num_hidden_layers=6, mlp_only_layers=[0], num_experts=8, num_experts_per_tok=2, **sizes, **heads
    )
    remember_family("qwen3_moe", infer_architecture(config))
    structure = build_structure(empty_model(config))
    with pytest.raises(BudgetError, match="whole experts, the same number in every layer") as refusal:
        kept_counts(structure, Budget(ratio, Profile(0, 0), heads=(2,) * 6))
    assert refusal.type is BudgetError
    # An expert has three matrices and a row of the router, in five layers.
    three = 3 * 5 * (3 * 48 * 64 + 64) / structure.total_parameters
    assert three > ratio
    counts = kept_counts(structure, Budget(three, Profile(0, 0), heads=(2,) * 6))
    assert {count for block, count in zip(structure.blocks, counts, strict=True) if block.kind == "experts"} == {5}
