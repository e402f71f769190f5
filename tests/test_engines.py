"""A run that is made for an engine leaves a model that the engine loads, or is refused before it begins."""

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.budget.counts import Budget, BudgetError, kept_counts, reference_budget
from adapruner.families import learn
from adapruner.families.inference import random_model
from adapruner.model.loading import empty_model
from adapruner.options import PruneConfig
from adapruner.run.options import options_for, options_when_split, serving_commands
from adapruner.structure.build import build_structure
from run_helpers import QUICK, exit_code, flags
from tiny_families import cut_to, tiny_config


@pytest.mark.parametrize(
    ("model_type", "engines", "options"),
    [
        ("llama", ("vllm",), {"layout": "per-layer"}),
        ("qwen2", ("vllm", "llama.cpp"), {"layout": "per-layer"}),
        ("phi3", ("vllm",), {"layout": "uniform"}),
        ("qwen2_moe", ("vllm",), {"layout": "uniform", "head_share": 0.0}),
        ("llama", ("vllm", "sglang"), {"layout": "uniform"}),
        ("llama", ("any",), {"layout": "uniform", "head_share": 0.0}),
        ("llama", ("llama.cpp", "mlx"), {"layout": "per-layer"}),
        ("llama", ("mlx", "sglang"), {"layout": "uniform"}),
        ("qwen2", ("mlx", "llama.cpp", "transformers"), {"layout": "per-layer"}),
        ("qwen3", ("llama.cpp",), {"layout": "uniform"}),
        ("qwen3", ("llama.cpp", "mlx"), {"layout": "uniform"}),
        ("gemma3_text", ("mlx", "vllm"), {"layout": "per-layer"}),
        ("gemma3_text", ("vllm", "any"), {"layout": "uniform", "head_share": 0.0}),
        ("gpt_neox", ("transformers",), {"layout": "per-layer"}),
    ],
)
def test_several_engines_get_what_all_of_them_load(model_type, engines, options):
    config = tiny_config(model_type)
    learn(config)
    assert options_for(PruneConfig.from_options(model="x", for_=engines), config) == options


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_a_model_whose_layers_differ_is_pruned_again_for_vllm(model_type):
    config = cut_to(random_model(tiny_config(model_type))).config
    assert type(config) is not type(tiny_config(model_type))
    assert options_for(PruneConfig.from_options(model="x", for_="vllm"), config) == {"layout": "per-layer"}


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("llama", {"for_": "sglang", "layout": "per-layer"}, "layers of equal widths"),
        ("qwen2", {"for_": "vllm", "layout": "uniform", "head_share": 0.5}, "all heads of a qwen2"),
        ("llama", {"for_": "any", "head_share": 0.5}, "any engine would need all heads of a llama"),
        ("gpt2", {"for_": "mlx"}, "mlx-lm does not load a pruned gpt2"),
        ("gpt2", {"for_": "llama.cpp"}, "not 'gpt2'"),
        ("bloom", {"for_": "any"}, "no stock bloom has fewer channels"),
    ],
)
def test_what_an_engine_does_not_load_is_refused(model_type, options, message):
    config = tiny_config(model_type)
    learn(config)
    with pytest.raises(AdaPrunerError, match=message):
        options_for(PruneConfig.from_options(model="x", **options), config)


@pytest.fixture(scope="module")
def arguments(model_folder, text_file):
    options = {name: value for name, value in QUICK.items() if not name.startswith("protect_")}
    return ["prune", str(model_folder), "--calibration", str(text_file), *flags(options)]


def test_a_run_for_any_engine_is_a_stock_model(arguments, windows, tmp_path, capsys):
    assert exit_code([*arguments, "--for", "any", "--for", "vllm", "-o", str(tmp_path / "run")]) == 0
    folder = tmp_path / "run" / "model"
    assert not list(folder.glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.config.num_attention_heads == 6
    assert stock.config.intermediate_size < 24
    with torch.no_grad():
        assert torch.equal(stock(windows).logits, adapruner.load(folder)(windows).logits)
    assert f"serve: vllm serve {folder}" in capsys.readouterr().out
    assert exit_code([*arguments, "--for", "any", "--for", "sglang", "-o", str(tmp_path / "run")]) == 0
    assert f"serve: python -m sglang.launch_server --model-path {folder}" in capsys.readouterr().out


def test_a_tokenizer_that_an_engine_cannot_read_is_told_before_the_run(arguments, tmp_path, capsys):
    assert exit_code([*arguments, "--for", "llama.cpp", "-o", str(tmp_path / "run")]) == 2
    assert "llama.cpp cannot read this tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_conflict_is_told_before_the_run(arguments, tmp_path, capsys):
    assert exit_code([*arguments, "--for", "sglang", "--layout", "per-layer", "-o", str(tmp_path / "run")]) == 2
    message = "--layout per-layer: sglang would need layers of equal widths; change it, or --for"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_code_in_the_folder_is_named_in_the_command(make_model, tokenizer, tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "modeling_pruned.py").touch()
    commands = serving_commands(("transformers", "mlx", "vllm", "any"), folder)
    assert commands == [
        f"transformers serve '{folder}' --trust-remote-code",
        f"mlx_lm.server --model '{folder}' --trust-remote-code",
        f"vllm serve '{folder}'  # with adapruner in the environment of vLLM",
    ]


# Sizes of which four bits on two GPUs leave something to choose.
LARGE = {
    **dict.fromkeys(("hidden_size", "n_embd"), 512),
    **dict.fromkeys(("intermediate_size", "n_inner", "moe_intermediate_size"), 4096),
    **dict.fromkeys(("num_attention_heads", "n_head"), 16),
    "num_key_value_heads": 8,
    **dict.fromkeys(("num_experts", "num_local_experts"), 32),
}

LARGE_LLAMA = {
    name: LARGE[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
}


def split(model_type, sizes=LARGE, **options):
    """The structure of a model that is to be split, and the groups that its blocks keep."""
    plain = tiny_config(model_type)
    config = tiny_config(model_type, **{name: size for name, size in sizes.items() if name in plain.to_dict()})
    learn(config)
    wanted = PruneConfig.from_options(model="x", for_="vllm", **options)
    wanted = wanted.model_copy(update=options_for(wanted, config) | options_when_split(wanted, config))
    structure = build_structure(empty_model(config))
    for hundredths in range(15, 60):  # the first ratio that so large steps meet
        with contextlib.suppress(BudgetError):
            return structure, kept_counts(structure, reference_budget(wanted, structure, hundredths / 100))
    raise AssertionError("no ratio is met")


@pytest.mark.parametrize(
    "model_type",
    [
        *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "gpt_neox"),
        *("mixtral", "qwen3_moe"),
    ],
)
def test_two_gpus_get_equal_parts_of_every_layer(model_type):
    # What vLLM asks of a checkpoint with two workers, and of groups of 128 weights with a scale in each.
    structure, counts = split(model_type, tensor_parallel=2)
    kept = dict.fromkeys((block.kind for block in structure.blocks), 0)
    for block, count in zip(structure.blocks, counts, strict=True):
        assert not count % (256 if block.kind == "channels" else 2)
        kept[block.kind] += count
    assert sum(kept.values()) < sum(block.groups for block in structure.blocks)


def test_heads_are_removed_in_pairs_for_two_gpus():
    """Of eight, at a ratio at which one GPU would keep an odd number: more than five, rounded to a multiple of two."""
    structure = build_structure(empty_model(tiny_config("llama", **LARGE_LLAMA)))
    alone, shared = (
        {
            count
            for block, count in zip(structure.blocks, kept_counts(structure, budget), strict=True)
            if block.kind == "heads"
        }
        for budget in (Budget(0.37, "uniform", heads=1.0, round_to=8, tensor_parallel=gpus) for gpus in (1, 2))
    )
    assert (alone, shared) == ({5}, {6})


@pytest.mark.parametrize(
    ("options", "width"),
    [({}, 256), ({"round_to": 128}, 256), ({"round_to": 64}, 64), ({"round_to": 8}, 16), ({"for_": "llama.cpp"}, 32)],
)
def test_the_larger_multiple_holds(options, width):
    config = tiny_config("llama", intermediate_size=4096)
    wanted = PruneConfig.from_options(
        **{"model": "x", "for_": "vllm", "tensor_parallel": 2} | options, given=[*options]
    )
    assert options_when_split(wanted, config) == {"round_to": width}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}, r"the 9 heads .*9 / 2 = 4.50"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 576},
            r"the 3 KV heads of layer 0 .*3 / 2 = 1.50",
        ),
        ({"intermediate_size": 4095}, r"the 4095 channels of layer 0 .*4095 / 2 = 2047.50"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(sizes, message):
    with pytest.raises(AdaPrunerError, match=message):
        split("llama", LARGE | sizes, tensor_parallel=2)


def test_the_heads_of_every_layer_are_split():
    """Of layers that differ, those that have attention."""
    wanted = PruneConfig.from_options(model="x", for_="vllm", tensor_parallel=2)
    kept = {0: 0, 1: 6, 2: 3, 3: 2}
    dense = random_model(tiny_config("llama", hidden_size=192, num_attention_heads=12, num_key_value_heads=6))
    pruned = cut_to(dense, lambda block: kept[block.layer] if block.kind == "heads" else block.groups)
    with pytest.raises(AdaPrunerError, match="the 3 KV heads of layer 2 cannot be divided among 2 GPUs"):
        options_when_split(wanted, pruned.config)
    kept[2] = 4
    pruned = cut_to(dense, lambda block: kept[block.layer] if block.kind == "heads" else block.groups)
    assert options_when_split(wanted, pruned.config) == {"round_to": 256}
    odd = cut_to(dense, lambda block: 1 if block.kind == "heads" and block.layer == 3 else block.groups)
    with pytest.raises(AdaPrunerError, match="heads of layer 3 cannot be divided among 4 GPUs"):
        options_when_split(wanted.model_copy(update={"tensor_parallel": 4}), odd.config)


def test_few_kv_heads_are_copied_and_all_kept():
    structure, counts = split("llama", LARGE | {"num_key_value_heads": 2}, tensor_parallel=4)
    assert {count for block, count in zip(structure.blocks, counts, strict=True) if block.kind == "heads"} == {2}


def test_a_ratio_between_steps_is_refused_with_the_nearest():
    structure = build_structure(empty_model(tiny_config("llama", intermediate_size=4096)))
    config = PruneConfig.from_options(model="x", layout="uniform", round_to=1024)
    with pytest.raises(BudgetError, match=r"come to 0\.2\d*, .*; choose a `ratio` near that, or lower `round_to`"):
        kept_counts(structure, reference_budget(config, structure, 0.3))
