"""A run that is made for an engine leaves a model that the engine loads, or is refused before it begins."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.families import learn
from adapruner.options import PruneConfig
from adapruner.run.options import options_for, serving_commands
from run_helpers import QUICK, exit_code, flags
from tiny_families import tiny_config


@pytest.mark.parametrize(
    ("model_type", "engines", "options"),
    [
        ("llama", ("vllm",), {"layout": "uniform"}),
        ("qwen2", ("vllm",), {"layout": "uniform", "head_share": 0.0}),
        ("llama", ("any",), {"layout": "uniform", "head_share": 0.0}),
        ("llama", ("llama.cpp", "mlx"), {"layout": "per-layer"}),
        ("llama", ("mlx", "sglang"), {"layout": "uniform"}),
        ("qwen2", ("mlx", "llama.cpp", "transformers"), {"layout": "per-layer"}),
        ("qwen3", ("llama.cpp",), {"layout": "uniform"}),
        ("qwen3", ("llama.cpp", "mlx"), {"layout": "uniform"}),
        ("gemma3_text", ("mlx", "vllm"), {"layout": "uniform", "head_share": 0.0}),
        ("gpt_neox", ("transformers",), {"layout": "per-layer"}),
    ],
)
def test_several_engines_get_what_all_of_them_load(model_type, engines, options):
    config = tiny_config(model_type)
    learn(config)
    assert options_for(PruneConfig.from_options(model="x", for_=engines), config) == options


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("llama", {"for_": "vllm", "layout": "per-layer"}, "layers of equal widths"),
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


def test_a_conflict_is_told_before_the_run(arguments, tmp_path, capsys):
    assert exit_code([*arguments, "--for", "vllm", "--layout", "per-layer", "-o", str(tmp_path / "run")]) == 2
    assert "--layout per-layer: vllm would need layers of equal widths; change it, or --for" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_code_in_the_folder_is_named_in_the_command(make_model, tokenizer, tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "modeling_pruned.py").touch()
    commands = serving_commands(("transformers", "mlx", "any"), folder)
    assert commands == [
        f"transformers serve '{folder}' --trust-remote-code",
        f"mlx_lm.server --model '{folder}' --trust-remote-code",
    ]
