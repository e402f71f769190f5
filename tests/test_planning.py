"""Budgets and plans against exhaustive counting on small structures."""

import itertools

import pytest
import torch
from pydantic import TypeAdapter
from rich.console import Console
from transformers import LlamaConfig, Qwen3MoeConfig

from adapruner.base.errors import AdaPrunerError
from adapruner.budget.counts import Budget, BudgetError, ByCost, Profile, UnreachableRatioError, kept_counts
from adapruner.budget.plan import PruningPlan, make_plan
from adapruner.families.inference import infer_architecture
from adapruner.model.architecture import remember_family
from adapruner.model.loading import empty_model
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model


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
    with pytest.raises(AdaPrunerError, match=r"at most 0\.6\d+ of .*, 0\.\d+ with equal shares"):
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


def test_a_budget_survives_json():
    """As part of the candidates in the files of a run."""
    adapter = TypeAdapter(Budget)
    for allocation in (Profile(2, 1), "uniform", ByCost(), ByCost(1, 2, heads=False, whole_attention=False)):
        budget = Budget(0.2, allocation, heads=0.5, round_to=32)
        assert adapter.validate_json(adapter.dump_json(budget)) == budget


def test_a_plan_fits_only_its_model(model, llama_7b):
    structure = build_structure(model)
    plan = make_plan(structure, torch.ones(structure.group_offsets[-1]), [b.groups for b in structure.blocks])
    with pytest.raises(AdaPrunerError, match="this plan is for a llama of"):
        plan.check_fits(llama_7b)


COSTS = torch.rand(4 * (3 + 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small():
    """Four layers of three KV groups and twelve channels."""
    sizes = {"vocab_size": 16, "hidden_size": 24, "num_hidden_layers": 4, "intermediate_size": 12}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    return build_structure(empty_model(LlamaConfig(**sizes, **heads)))


@pytest.mark.parametrize("seed", range(4))
def test_the_channels_that_cost_least_are_removed_wherever_they_are(small, seed):
    """Against sorting: of each layer, at least a fifth stays."""
    costs = torch.rand(4 * (3 + 12), generator=torch.Generator().manual_seed(seed))
    parts = dict(enumerate(costs.split([block.groups for block in small.blocks])))
    layers = {number: block for number, block in enumerate(small.blocks) if block.kind == "channels"}
    cheapest = sorted((float(cost), number) for number in layers for cost in parts[number].sort().values[:9])
    for ratio in (0.05, 0.1, 0.15):
        counts = kept_counts(small, Budget(ratio, ByCost(heads=False)), costs)
        removed = round(ratio * small.total_parameters / small.blocks[1].parameters_per_group)
        gone = [number for _, number in cheapest[:removed]]
        assert counts == [
            block.groups - gone.count(number) if number in layers else 3 for number, block in enumerate(small.blocks)
        ]


def test_attention_goes_whole_where_that_costs_least(small):
    """Its last heads take the rest of the attention with them."""
    costs = torch.ones(4, 15)
    costs[2, :3] = 0.01
    costs[1, :2] = 0.02
    counts = kept_counts(small, Budget(0.3, ByCost()), costs.flatten())
    of_heads = [count for block, count in zip(small.blocks, counts, strict=True) if block.kind == "heads"]
    assert of_heads == [3, 1, 0, 3]


def test_costs_keep_what_is_protected_and_what_options_keep(small):
    def kept(allocation: ByCost, ratio: float = 0.1) -> dict[tuple[int, str], int]:
        counts = kept_counts(small, Budget(ratio, allocation), COSTS)
        return {(block.layer, block.kind): count for block, count in zip(small.blocks, counts, strict=True)}

    for (layer, _), count in kept(ByCost(1, 2)).items():
        assert layer == 1 or count in (3, 12)
    assert {count for (_, kind), count in kept(ByCost(heads=False), 0.5).items() if kind == "heads"} == {0, 3}
    assert 0 in kept(ByCost(), 0.5).values()
    assert 0 not in kept(ByCost(whole_attention=False), 0.4).values()
    with pytest.raises(UnreachableRatioError, match=r"a ratio of 0\.5 cannot be reached: at most 0\.\d+ of the"):
        kept(ByCost(heads=False, whole_attention=False), 0.5)


@pytest.mark.parametrize("round_to", [32, 512])
def test_widths_by_cost_are_rounded(llama_7b, round_to):
    costs = torch.rand(llama_7b.group_offsets[-1], generator=torch.Generator().manual_seed(1))
    counts = kept_counts(llama_7b, Budget(0.3, ByCost(), round_to=round_to), costs)
    widths = [count for block, count in zip(llama_7b.blocks, counts, strict=True) if block.kind == "channels"]
    assert all(width % round_to == 0 or width == 11_008 for width in widths)
    assert min(widths) >= 0.2 * 11_008
    assert abs(llama_7b.removed_parameters(counts) / llama_7b.total_parameters - 0.3) <= 0.005


def test_a_ratio_that_steps_of_channels_overshoot_is_refused_with_one_that_is_met(small):
    """Four channels are more than two percent of the parameters."""

    def removed(ratio: float) -> float:
        counts = kept_counts(small, Budget(ratio, ByCost(heads=False, whole_attention=False), round_to=4), COSTS)
        return small.removed_parameters(counts) / small.total_parameters

    step = 4 * small.blocks[1].parameters_per_group / small.total_parameters
    assert step > 0.02
    for ratio in (1.6 * step, 2.6 * step):
        with pytest.raises(BudgetError, match=r"channels come to 0\.\d+; choose a `ratio` near that") as refusal:
            removed(ratio)
        reachable = float(str(refusal.value).split("come to ")[1].split(";")[0])
        assert ratio < reachable == pytest.approx(removed(reachable), abs=1e-4)


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


@pytest.mark.parametrize("ratio", [0.04, 0.14, 0.23])
def test_more_can_be_reached_than_a_ratio_between_whole_experts(ratio):
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3MoeConfig(
        num_hidden_layers=6, mlp_only_layers=[0], num_experts=8, num_experts_per_tok=2, **sizes, **heads
    )
    remember_family("qwen3_moe", infer_architecture(config))
    structure = build_structure(empty_model(config))
    with pytest.raises(BudgetError, match="whole experts, the same number in every layer") as refusal:
        kept_counts(structure, Budget(ratio, Profile(0, 0)))
    assert refusal.type is BudgetError
    # An expert has three matrices and a row of the router, in five layers.
    three = 3 * 5 * (3 * 48 * 64 + 64) / structure.total_parameters
    assert three > ratio
    counts = kept_counts(structure, Budget(three, Profile(0, 0)))
    assert {count for block, count in zip(structure.blocks, counts, strict=True) if block.kind == "experts"} == {5}
