"""One suite over every known family: what is cut equals what is masked, and what is saved is what is loaded."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

import adapruner
from adapruner.budget.plan import PruningPlan
from adapruner.checkpoint import save_checkpoint
from adapruner.model.architecture import known_architectures
from adapruner.structure.blocks import Structure, count_parameters
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from tiny_families import cut_to, random_plan

CASES = [
    (family, key_value_heads, granularity, layout, tied)
    for family, architecture in known_architectures().items()
    for key_value_heads, granularity, tied in ((3, "kv-group", False), (3, "query-head", True), (6, "kv-group", True))
    # A head with keys of its own is the same in all families: of those that share keys, in one.
    if bool(architecture.config_fields.key_value_heads) == (key_value_heads == 3) or family == "llama"
    for layout in ("per-layer", "uniform")
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def dense_and_plan(request, make_model):
    family, key_value_heads, granularity, layout, tied = request.param
    model = make_model(family, key_value_heads, tie_word_embeddings=tied)
    structure = build_structure(model, granularity)
    # A different cut in every layer: the first stays whole, the last keeps one group (per stratum) of each kind. Or
    # the same everywhere: a third goes (of two query heads of a KV head, one).
    counts = []
    for block in structure.blocks:
        per_stratum = block.groups // block.strata
        thirds = block.layer if layout == "per-layer" else 1
        counts.append(block.strata * max(1, per_stratum - math.ceil(thirds * per_stratum / 3)))
    return model, structure, random_plan(structure, counts)


# The projections that read the heads and the channels of a layer, by path of the layer list.
READERS = {
    "bloom": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2"),
}


def masked(model: PreTrainedModel, structure: Structure, plan: PruningPlan) -> PreTrainedModel:
    """The dense model in which nothing that a removed group computes is read: an independent way to remove it."""
    model = copy.deepcopy(model)
    layers, *readers = READERS.get(model.config.model_type, ("model.layers", "self_attn.o_proj", "mlp.down_proj"))
    for block, kept in zip(structure.blocks, plan.blocks, strict=True):
        layer = model.get_submodule(f"{layers}.{block.layer}")
        weight = layer.get_submodule(readers[block.kind == "channels"]).weight.data
        columns = (weight.T if model.config.model_type == "gpt2" else weight).unflatten(1, (block.groups, -1))
        removed = sorted(set(range(block.groups)) - set(kept.kept))
        columns[:, removed] = 0
        if model.config.model_type == "olmo2" and block.kind == "heads":
            _take_out_of_norms(layer.self_attn, block.groups, removed, structure.head_granularity)
    return model


def _take_out_of_norms(attention: torch.nn.Module, groups: int, removed: list[int], granularity: str) -> None:
    """Norms over all heads shall be over those that stay."""
    stays = torch.ones(groups, dtype=torch.bool)
    stays[removed] = False

    def over_those_that_stay(norm: torch.nn.Module, inputs: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        squares = x.square()[..., stays.repeat_interleave(x.shape[-1] // groups)]
        return norm.weight * x / (squares.mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()

    for name in ("q_norm", "k_norm") if granularity == "kv-group" else ("q_norm",):
        attention.get_submodule(name).register_forward_hook(over_those_that_stay)


def test_pruned_equals_masked(dense_and_plan, windows):
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


def test_saved_is_loaded_and_generates(dense_and_plan, windows, tokenizer, tmp_path):
    model, structure, plan = dense_and_plan
    pruned = prune_model(model, structure, plan)
    expected = pruned(windows).logits
    save_checkpoint(pruned, tokenizer, tmp_path / "first")
    loaded = adapruner.load(tmp_path / "first")
    assert torch.equal(loaded(windows).logits, expected)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    # Without any code but that of transformers.
    assert type(AutoConfig.from_pretrained(tmp_path / "first")).__module__.startswith("transformers.")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "first")) == len(tokenizer)

    save_checkpoint(loaded, tokenizer, tmp_path / "second")
    again = adapruner.load(tmp_path / "second")
    assert torch.equal(again(windows).logits, expected)

    prompt = {"input_ids": windows[:2], "attention_mask": torch.ones_like(windows[:2])}
    greedy = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    with_cache = loaded.generate(**prompt, **greedy, use_cache=True)
    assert torch.equal(with_cache, loaded.generate(**prompt, **greedy, use_cache=False))
    if is_the_same_eagerly(model, windows):
        loaded.set_attn_implementation("eager")
        torch.testing.assert_close(loaded(windows).logits, expected, rtol=1e-4, atol=1e-4)


def is_the_same_eagerly(model: PreTrainedModel, windows: torch.Tensor) -> bool:
    """Whether the stock class is: transformers 5.20 caps the attention logits of Gemma 2 in eager mode alone."""
    chosen, logits = model.config._attn_implementation, model(windows).logits
    model.set_attn_implementation("eager")
    same = torch.allclose(model(windows).logits, logits, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation(chosen)
    return same


REMOTE_CODE = """
import sys
sys.modules["adapruner"] = None  # as if it were not installed
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

for folder in sys.argv[1:]:
    expected = torch.load(folder + "/../expected.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(expected["windows"]).logits, expected["logits"]), folder
    decoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(decoder(expected["windows"]).last_hidden_state, expected["hidden"]), folder
    assert len(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)) == expected["vocabulary"], folder
    greedy = dict(attention_mask=torch.ones(2, 12), do_sample=False, max_new_tokens=8, min_new_tokens=8)
    with_cache = model.generate(expected["windows"][:2], use_cache=True, **greedy)
    assert torch.equal(with_cache, model.generate(expected["windows"][:2], use_cache=False, **greedy)), folder
    model.save_pretrained(folder + "/../again")
    again = AutoModelForCausalLM.from_pretrained(folder + "/../again", trust_remote_code=True)
    assert torch.equal(again(expected["windows"]).logits, expected["logits"]), folder
"""


def test_every_family_loads_without_the_package(make_model, windows, tokenizer, tmp_path):
    for family in known_architectures():
        pruned = cut_to(make_model(family))
        save_checkpoint(pruned, tokenizer, tmp_path / family / "model")
        with torch.no_grad():
            expected = {
                "windows": windows,
                "logits": pruned(windows).logits,
                "hidden": pruned.base_model(windows).last_hidden_state,
                "vocabulary": len(tokenizer),
            }
        torch.save(expected, tmp_path / family / "expected.pt")
    finished = subprocess.run(
        [sys.executable, "-c", REMOTE_CODE, *(str(tmp_path / family / "model") for family in known_architectures())],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PATH": ""},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("family", known_architectures())
def test_a_pruned_model_can_be_pruned_again(family, make_model, windows):
    """First heads, then channels as well, then channels alone."""
    model = make_model(family)
    for heads, channels in ((1, 0), (1, 3), (0, 3)):
        structure = build_structure(model)
        counts = [
            max(1, block.groups - (block.layer > 1) * {"heads": heads, "channels": channels}[block.kind])
            for block in structure.blocks
        ]
        plan = random_plan(structure, counts)
        pruned = prune_model(model, structure, plan)
        expected = masked(model, structure, plan)(windows).logits
        torch.testing.assert_close(pruned(windows).logits, expected, rtol=1e-4, atol=1e-4)
        model = pruned


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3", "qwen3"])
def test_removed_attention_stays_removed(family, make_model, windows):
    model = make_model(family)
    gone = {("heads", 0)}
    for fewer in (0, 1):
        structure = build_structure(model)
        counts = [0 if (block.kind, block.layer) in gone else block.groups - fewer for block in structure.blocks]
        plan = random_plan(structure, counts)
        pruned = prune_model(model, structure, plan)
        if fewer:
            expected = masked(model, structure, plan)(windows).logits
            torch.testing.assert_close(pruned(windows).logits, expected, rtol=1e-4, atol=1e-4)
        model, gone = pruned, set()
    assert model.num_parameters() < make_model(family).num_parameters()


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0], "factor": 4.0}


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}),
        ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}),
        ("stablelm", {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5}),
        ("phi3", LONGROPE | {"original_max_position_embeddings": 8, "partial_rotary_factor": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["rope_type"],
)
def test_positions_of_long_texts(family, rope, make_model, windows, tokenizer, tmp_path):
    """Longer than the model was made for, with rotary embeddings that then look into the config."""
    # transformers 5.16 takes the part of StableLM that rotates from the older key alone.
    older = {key: value for key, value in rope.items() if key == "partial_rotary_factor"}
    model = make_model(family, rope_parameters={"rope_theta": 1e4} | rope, max_position_embeddings=8, **older)
    structure = build_structure(model)
    plan = random_plan(structure, [max(1, block.groups - block.layer) for block in structure.blocks])
    save_checkpoint(prune_model(model, structure, plan), tokenizer, tmp_path / "model")
    expected = masked(model, structure, plan)(windows).logits
    torch.testing.assert_close(adapruner.load(tmp_path / "model")(windows).logits, expected, rtol=1e-4, atol=1e-4)
