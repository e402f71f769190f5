"""Mixtures of experts: measured, ranked, and removed."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.budget.counts import Budget, Profile, kept_counts
from adapruner.budget.plan import make_plan
from adapruner.checkpoint import save_checkpoint, write_model
from adapruner.copying import copies_without_experts
from adapruner.families import open_config
from adapruner.families.inference import infer_architecture, random_model
from adapruner.families.proof import failed_checks
from adapruner.importance import TERMS, MetricPoint, score_groups
from adapruner.measurement.moments import InputMoments, measure_moments
from adapruner.measurement.routing import measure_routing
from adapruner.measurement.taylor import Statistics, measure
from adapruner.model.architecture import Architecture, remember_family, using_architecture
from adapruner.model.layers import whole_state
from adapruner.model.loading import copy_in_dtype, load_model
from adapruner.model.places import find_model
from adapruner.model.stored import read_all
from adapruner.options import EXPERT_TRIALS, OF_A_SEARCH
from adapruner.run.inputs import HELD_OUT_TO_HEAL
from adapruner.structure.blocks import Structure
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from adapruner.text.windows import load_texts_by_use
from run_helpers import QUICK, config_with_experts, stages_done
from tiny_families import random_plan, tiny_config

FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3")
ONE_BY_ONE = ("mixtral", "deepseek_v3", "qwen3_moe", "olmoe", "phimoe", "ernie4_5_moe", "glm4_moe", "minimax")


@cache
def described(family: str) -> Architecture:
    return infer_architecture(tiny_config(family))


def make_mixture(family: str) -> PreTrainedModel:
    remember_family(family, described(family))
    return random_model(tiny_config(family))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(params=FAMILIES)
def mixture(request):
    return make_mixture(request.param)


@pytest.fixture
def mixtral():
    return make_mixture("mixtral")


def taylor_by_hand(model: PreTrainedModel, structure: Structure, windows: Tensor) -> Tensor:
    """[samples, vectors]: Σ_k g_k w_k, with the gradients of PyTorch."""
    rows = []
    model.requires_grad_(True)
    for window in windows:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        row = []
        for block in structure.blocks:
            for part in block.matrices:
                parameter = model.get_parameter(part.parameter)
                product = (parameter.grad * parameter).detach()
                if block.experts:
                    for one in product if not part.is_transposed else product.transpose(1, 2):
                        rows_of_one = one.sum(1 - part.axis)
                        end = part.offset + block.groups // block.experts * part.width
                        row.append(rows_of_one[part.offset : end, None])
                elif block.is_projected:
                    used = part.as_projections(product)[0].sum(1 - part.axis)
                    row.append(used[part.offset : part.offset + block.groups * part.width].unflatten(0, (-1, 1)))
                else:
                    row.append(product.movedim(part.axis, 0).flatten(1).sum(1, keepdim=True))
        rows.append(torch.cat(row).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("layer_wise", [False, True])
@pytest.mark.parametrize("granularity", ["expert", "channel"])
def test_taylor_terms_are_those_of_autograd(mixture, windows, layer_wise, granularity):
    if mixture.config.model_type == "deepseek_v3" and granularity == "channel":
        # Shared experts are as wide.
        with pytest.raises(AdaPrunerError, match="use `expert_granularity` expert"):
            build_structure(mixture, experts=granularity)
        return
    structure = build_structure(mixture, experts=granularity)
    statistics = measure(mixture, structure, windows[:3], batch_size=2, layer_wise=layer_wise)
    torch.testing.assert_close(statistics.taylor, taylor_by_hand(mixture, structure, windows[:3]), rtol=1e-3, atol=1e-6)


def test_routing_is_what_the_router_says(mixtral, windows):
    """Share of tokens, and router weight times norm of the output, expert by expert (arXiv 2510.13999)."""
    structure = build_structure(mixtral)
    statistics = measure(mixtral, structure, windows[:2])
    layer = mixtral.model.layers[1].mlp
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    mixtral.requires_grad_(False)
    mixtral(windows[:2])
    hook.remove()
    (state,) = seen
    probabilities = torch.softmax(state @ layer.gate.weight.T, -1)
    weights, chosen = probabilities.topk(2)
    weights /= weights.sum(-1, keepdim=True)
    block = next(number for number, each in enumerate(structure.blocks) if each.kind == "experts" and each.layer == 1)
    first = structure.group_offsets[block]
    for expert in range(4):
        gate, up = (state @ layer.experts.gate_up_proj[expert].T).chunk(2, -1)
        norms = ((torch.nn.functional.silu(gate) * up) @ layer.experts.down_proj[expert].T).norm(dim=-1)
        routed = (chosen == expert).any(-1)
        weight = torch.where(chosen == expert, weights, 0).sum(-1)
        share, output = statistics.routed_share, statistics.routed_output
        assert share is not None
        assert output is not None
        assert float(share[:, first + expert].mean()) == pytest.approx(float(routed.float().mean()))
        assert float(output[:, first + expert].mean()) == pytest.approx(float((weight * norms).mean()), rel=1e-3)
        if routed.any():
            expected = float((weight * norms)[routed].mean())
            score = float(TERMS["expert_output"].function(statistics)[first + expert])
            assert score == pytest.approx(expected, rel=1e-3)


def read_by_experts(model: PreTrainedModel, layer: int, windows: Tensor) -> Tensor:
    """[experts, tokens, channels]: what the down projections of a Mixtral read, times the weight of the router."""
    seen: list[Tensor] = []
    mlp = model.model.layers[layer].mlp
    hook = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(windows)
        hook.remove()
        (state,) = seen
        weights, chosen = torch.softmax(state @ mlp.gate.weight.T, -1).topk(2)
        weights /= weights.sum(-1, keepdim=True)
        read = []
        for expert in range(4):
            gate, up = (state @ mlp.experts.gate_up_proj[expert].T).chunk(2, -1)
            weight = torch.where(chosen == expert, weights, 0).sum(-1, keepdim=True)
            read.append(torch.nn.functional.silu(gate) * up * weight)
    return torch.stack(read)


def channels_of(structure: Structure, layer: int) -> int:
    return next(number for number, block in enumerate(structure.blocks) if block.experts and block.layer == layer)


def test_moments_of_experts_are_those_of_what_they_read(mixtral, windows):
    structure = build_structure(mixtral, experts="channel")
    number = channels_of(structure, 1)
    moments = dict(measure_moments(mixtral, structure, windows, [number]))[number]
    read = read_by_experts(mixtral, 1, windows)
    torch.testing.assert_close(moments.second, read.mT @ read / read.shape[1], rtol=1e-3, atol=1e-6)
    statistics = measure(mixtral, structure, windows)
    own = structure.block_of_group[structure.group_of_input] == number
    squared = statistics.input_squared[:, own].mean(0)
    torch.testing.assert_close(squared, read.square().mean(1).flatten(), rtol=1e-3, atol=1e-6)


def test_channels_of_experts_are_compensated_by_least_squares(mixtral):
    """What each expert puts out is as near to what it was as any down projection of the kept channels comes."""
    windows = torch.randint(3, 256, (16, 64), generator=torch.Generator().manual_seed(0))
    structure = build_structure(mixtral, experts="channel")
    number = channels_of(structure, 0)
    measured = dict(measure_moments(mixtral, structure, windows, [number]))[number]
    moments = {number: InputMoments(measured.second, 1e-9)}
    counts = [block.groups - 4 * 30 * (each == number) for each, block in enumerate(structure.blocks)]
    plan = random_plan(structure, counts)
    pruned = prune_model(mixtral, structure, plan, moments)
    before, after = (model.model.layers[0].mlp.experts.down_proj.detach().double() for model in (mixtral, pruned))
    channels = before.shape[2]
    kept = torch.tensor(plan.blocks[number].kept).view(4, -1) % channels
    for read, own, new, stays in zip(read_by_experts(mixtral, 0, windows).double(), before, after, kept, strict=True):
        wanted, given = read @ own.T, read[:, stays]
        least = (given @ torch.linalg.lstsq(given, wanted).solution - wanted).norm()
        assert 1e-3 < least < 0.9 * (given @ own[:, stays].T - wanted).norm()
        assert (given @ new.T - wanted).norm() < 1.001 * least


def test_channels_inside_of_experts_are_pruned_from_end_to_end(mixtral, tokenizer, text_file, tmp_path):
    save_checkpoint(mixtral, tokenizer, tmp_path / "dense")
    structure = build_structure(mixtral, experts="channel")
    per_channel = sum(4 * block.parameters_per_group for block in structure.blocks if block.experts)
    own = {"ratio": 16 * per_channel / structure.total_parameters, "trials": 6, "expert_granularity": "channel"}
    uniform = {"layout": "uniform", "head_share": 0.0, "protect_first": None, "protect_last": None}
    options = QUICK | own | uniform
    result = adapruner.prune(str(tmp_path / "dense"), output=tmp_path / "run", calibration=str(text_file), **options)
    for block in result.plan.blocks:
        if block.kind == "channels":
            of_experts = torch.tensor(block.kept) // (block.groups // 4)
            assert of_experts.bincount().tolist() == [block.groups // 4 - 16] * 4
    model = adapruner.load(result.model_folder)
    assert type(model) is MixtralForCausalLM
    assert (model.config.num_local_experts, model.config.intermediate_size) == (
        4,
        mixtral.config.intermediate_size - 16,
    )


def test_an_expert_that_does_nothing_is_the_least_important(mixtral, windows):
    with torch.no_grad():
        for layer in mixtral.model.layers:
            layer.mlp.experts.down_proj[2] = 0
    structure = build_structure(mixtral)
    statistics = measure(mixtral, structure, windows)
    for term in ("fine_first", "expert_output"):
        scores = score_groups(statistics, structure, MetricPoint(weights={term: 1}))
        for number, block in enumerate(structure.blocks):
            if block.kind == "experts":
                assert int(scores[structure.block_of_group == number].argmin()) == 2, term


def test_all_layers_keep_the_same_number(mixtral, windows):
    structure = build_structure(mixtral)
    for layout in ("per-layer", "uniform"):
        counts = kept_counts(structure, Budget(0.195, Profile(1, 1) if layout == "per-layer" else "uniform"))  # type: ignore[arg-type]
        kept = {count for block, count in zip(structure.blocks, counts, strict=True) if block.kind == "experts"}
        assert kept == {3}
    # Two experts see every token: of two, there would be no choice.
    with pytest.raises(AdaPrunerError, match="cannot be reached"):
        kept_counts(structure, Budget(0.5, Profile(0, 0)))


def test_a_mixture_is_pruned_to_a_stock_one(mixtral, windows, tokenizer, tmp_path):
    """Compensation leaves experts as they are."""
    structure = build_structure(mixtral)
    statistics = measure(mixtral, structure, windows)
    scores = score_groups(statistics, structure, MetricPoint(weights={"expert_output": 1}))
    plan = make_plan(structure, scores, kept_counts(structure, Budget(0.195, Profile(0, 0))))
    moments = dict(measure_moments(mixtral, structure, windows))
    assert all(structure.blocks[number].is_projected for number in moments)
    pruned = prune_model(mixtral, structure, plan, moments)
    assert type(pruned) is MixtralForCausalLM
    assert pruned.config.num_local_experts == 3
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(stock(windows).logits, pruned(windows).logits)


def test_the_decoder_alone_is_loaded_with_its_experts(mixtral, windows, tokenizer, tmp_path):
    """vLLM loads the class of the decoder, which has to rename the experts of the file as the stock class does."""
    structure = build_structure(mixtral)
    counts = [block.groups - (block.kind == "heads" and block.layer == 0) for block in structure.blocks]
    pruned = prune_model(mixtral, structure, random_plan(structure, counts))
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    decoder = AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True)
    with torch.no_grad():
        hidden = pruned.base_model(windows).last_hidden_state
        assert torch.equal(decoder(windows).last_hidden_state, hidden)


def test_layers_of_different_numbers_of_experts_are_computed_as_stock_ones(mixtral, windows, tokenizer, tmp_path):
    """By grouped products, which are faster, unless the rows of an expert do not fit those."""
    structure = build_structure(mixtral)
    counts = [block.groups - (block.kind == "experts" and block.layer == 0) for block in structure.blocks]
    pruned = prune_model(mixtral, structure, random_plan(structure, counts))
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    for model in (pruned, loaded):
        assert type(model) is not type(mixtral)
        assert model.config._experts_implementation == mixtral.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        grouped = loaded(windows).logits
        loaded.set_experts_implementation("eager")
        torch.testing.assert_close(loaded(windows).logits, grouped)
    with using_architecture(infer_architecture(mixtral.config)):
        by_channel = build_structure(mixtral, experts="channel")
        odd = [
            block.groups - block.strata * (block.kind == "channels") * (1 + block.layer) for block in by_channel.blocks
        ]
        narrow = prune_model(mixtral, by_channel, random_plan(by_channel, odd))
    assert narrow.config._experts_implementation == "eager"


def test_a_mixture_is_pruned_from_end_to_end(mixtral, tokenizer, text_file, tmp_path):
    save_checkpoint(mixtral, tokenizer, tmp_path / "dense")
    options = QUICK | {"ratio": 0.195, "trials": 11}
    result = adapruner.prune(str(tmp_path / "dense"), output=tmp_path / "run", calibration=str(text_file), **options)
    assert {len(block.kept) for block in result.plan.blocks if block.kind == "experts"} == {3}
    assert any(point.parameters.get("family.routing") for point in result.result.search.points)
    assert "experts kept" in (result.model_folder / "README.md").read_text()
    statistics = Statistics.load(tmp_path / "run" / "statistics.safetensors")
    assert statistics.routed_output is not None
    # Experts lie in the files one by one, and are put together layer by layer.
    streamed = adapruner.prune(
        str(tmp_path / "dense"), output=tmp_path / "b", calibration=str(text_file), layer_wise=True, **options
    )
    assert streamed.plan == result.plan
    first, second = (load_file(folder / "model.safetensors") for folder in (streamed.model_folder, result.model_folder))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_experts_that_are_stored_one_by_one_are_read_by_layer(family, windows, tmp_path):
    model = make_mixture(family)
    model.save_pretrained(tmp_path, max_shard_size="100KB")  # the experts of a layer lie in several files
    stored = {name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    assert not stored >= model.state_dict().keys()
    location = find_model(str(tmp_path))
    with torch.no_grad():
        logits = model(windows).logits
        assert torch.equal(load_model(location, layer_wise=True)(windows).logits, logits)
        deferred = load_model(location, deferred=True)
        read_all(deferred)
        assert torch.equal(deferred(windows).logits, logits)


# One by one, and stacked.
@pytest.mark.parametrize("family", [*ONE_BY_ONE, "gpt_oss"])
def test_kept_experts_are_copied_byte_for_byte(family, windows, tokenizer, tmp_path):
    """The folder is that of a model in memory without these experts, and its config that of the original with fewer."""
    remember_family(family, described(family))
    odd = tiny_config(family)
    odd.rope_parameters = odd.rope_parameters | {"rope_theta": 12345.0}
    odd.field_of_the_author = {"nobody": ["reads", "it"]}
    model = random_model(odd)
    save_checkpoint(model, tokenizer, tmp_path / "dense")
    location = find_model(tmp_path / "dense")
    config = open_config(location)
    structure = build_structure(model)
    counts = [block.groups - block.strata * (block.kind == "experts") for block in structure.blocks]
    plan = random_plan(structure, counts)
    write = copies_without_experts(location, config, structure, plan)
    for folder, by in (("cut", write_model), ("copied", write)):
        cut = prune_model(model, structure, plan) if folder == "cut" else model
        save_checkpoint(cut, tokenizer, tmp_path / folder, write=by, shard_size="20KB")
    cut, copied = (tensors_of(tmp_path / folder) for folder in ("cut", "copied"))
    assert cut.keys() == copied.keys()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in cut.items())
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("cut", "copied")]
    assert configs[1].items() <= configs[0].items()  # a model in memory states the width of its heads
    assert configs[1] == config_with_experts(tmp_path / "dense", 3)
    assert configs[1]["rope_parameters"]["rope_theta"] == 12345
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("cut", "copied"))
    with torch.no_grad():
        assert torch.equal(first(windows).logits, second(windows).logits)


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_what_a_router_adds_stays_in_float32(family, tmp_path):
    """Rounded to bfloat16, its biases would choose other experts."""
    make_mixture(family).save_pretrained(tmp_path)
    location = find_model(str(tmp_path))
    whole = load_model(location, "bfloat16").state_dict()
    assert {str(weight.dtype) for weight in whole.values()} == {"torch.bfloat16", "torch.float32"}
    deferred = load_model(location, "bfloat16", deferred=True)
    read_all(deferred)
    for state in (whole_state(load_model(location, "bfloat16", layer_wise=True)), deferred.state_dict()):
        for name, weight in whole.items():
            assert state[name].dtype == weight.dtype, name
            assert torch.equal(state[name], weight), name


def test_an_expert_that_is_missing_in_the_files_is_told(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    del tensors[name if name in tensors else name.replace("mlp.", "block_sparse_moe.").replace("down_proj", "w2")]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdaPrunerError, match=r"layers.1.mlp.experts.down_proj is \(3, .* in the files and \(4, "):
        load_model(find_model(str(tmp_path)), layer_wise=True)


def test_routing_that_chooses_groups_of_experts_first_is_proven():
    config = tiny_config("deepseek_v3")
    config.n_routed_experts, config.n_group, config.topk_group = 8, 2, 1
    architecture, model = infer_architecture(config), random_model(config)
    with using_architecture(architecture):
        blocks = [block for block in build_structure(model).blocks if block.kind == "experts"]
    # Two of one group see a token, so three of each stay.
    assert {(block.strata, block.least) for block in blocks} == {(2, 6)}
    assert not failed_checks(model, architecture)


def test_experts_whose_projections_are_modules_of_their_own_are_cut_whole():
    """JetMoE: no stack in the module of the down projections computes what they read."""
    experts = infer_architecture(tiny_config("jetmoe")).experts
    assert experts is not None
    assert experts.channels is None


def test_experts_are_searched_by_default(mixtral, tokenizer, text_file, tmp_path):
    mixtral.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = str(tmp_path / "model"), str(text_file)
    options = {name: value for name, value in QUICK.items() if name not in OF_A_SEARCH} | {
        "ratio": 0.2,
        "trials": None,
        "seq_len": 5,
    }
    result = adapruner.prune(*arguments, output=tmp_path / "run", **options)
    assert result.result.config.trials == EXPERT_TRIALS == len(result.result.search.points)
    assert result.result.costs is None  # options decide how much each layer loses


def test_experts_are_ranked_in_one_forward_pass(mixtral, tokenizer, text_file, tmp_path, capsys, monkeypatch):
    """By what they add to the hidden state, which is what the terms of a search say of the same text."""
    monkeypatch.setattr("adapruner.run.choice.FEW_TOKENS", 9999)
    save_checkpoint(mixtral, tokenizer, tmp_path / "dense")
    options = {name: value for name, value in QUICK.items() if name not in OF_A_SEARCH} | {"ratio": 0.195, "trials": 0}
    arguments = str(tmp_path / "dense"), str(text_file)
    result = adapruner.prune(*arguments, output=tmp_path / "run", **options)
    assert "experts were chosen for fewer than 9999 tokens" in capsys.readouterr().err
    structure, removals = build_structure(mixtral), load_file(tmp_path / "run" / "removals.safetensors")
    windows, _ = load_texts_by_use(tmp_path / "run" / "windows.safetensors")["compensation"].held_out(HELD_OUT_TO_HEAL)
    statistics = measure(mixtral, structure, windows.windows)
    experts = torch.tensor([block.kind == "experts" for block in structure.blocks])[structure.block_of_group]
    scores = TERMS["expert_output"].function(statistics)
    torch.testing.assert_close(
        removals["tempered_error"][experts], scores[experts], rtol=0.02, atol=1e-6
    )  # in bfloat16
    share = statistics.routed_share
    assert share is not None
    torch.testing.assert_close(removals["expert_tokens"] / windows.windows.numel(), share.mean(0), rtol=0, atol=0.02)
    for number, block in enumerate(result.plan.blocks):
        if block.kind == "experts":
            own = scores[structure.block_of_group == number]
            assert int(own.argmin()) not in block.kept
            assert len(block.kept) == 3
    stages = stages_done(tmp_path / "run")
    assert "reading experts" in stages
    assert not {"measuring", "searching", "reading activations"} & {*stages}
    # Another ratio takes over what was measured.
    adapruner.prune(from_=tmp_path / "run", output=tmp_path / "b", ratio=0.2)
    assert not {"reading experts", "comparing removals"} & {*stages_done(tmp_path / "b")}


def test_experts_whose_router_is_not_seen_are_searched(windows):
    model = make_mixture("jetmoe")
    with pytest.raises(AdaPrunerError, match=r"the router of a jetmoe .* leave `trials` out"):
        measure_routing(model, build_structure(model), windows)


def test_experts_of_any_width_are_proven_and_computed_in_bfloat16():
    """Grouped products of PyTorch refuse rows that are not multiples of 16 bytes."""
    config = tiny_config("mixtral")
    config.intermediate_size = 40
    architecture, model = infer_architecture(config), random_model(config)
    assert not failed_checks(model, architecture, "channel")
    with using_architecture(architecture):
        structure = build_structure(model, experts="channel")
        counts = [block.groups * 3 // 4 for block in structure.blocks]
        pruned = prune_model(model, structure, random_plan(structure, counts))
        rounded = copy_in_dtype(pruned, torch.bfloat16)
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        exact, logits = pruned(tokens).logits, rounded(tokens).logits.float()
    assert (logits - exact).norm() < 0.05 * exact.norm()


def test_a_family_that_loses_whole_experts_alone_is_pruned_from_end_to_end(tokenizer, text_file, tmp_path):
    """No weights are corrected, so that no second moments are kept; and its search may be given less text."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("olmoe", vocab_size=len(tokenizer), num_experts=8))
    save_checkpoint(model.eval(), tokenizer, tmp_path / "dense")
    own = {name: value for name, value in QUICK.items() if name != "trials"} | {"ratio": 0.113, "heal": "none"}
    result = adapruner.prune(str(tmp_path / "dense"), output=tmp_path / "run", calibration=str(text_file), **own)
    assert {len(block.kept) for block in result.plan.blocks if block.kind == "experts"} == {7}
    assert result.result.config.trials == EXPERT_TRIALS
