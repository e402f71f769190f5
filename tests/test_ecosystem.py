"""A per-layer checkpoint in the hands of other libraries: everything that is done with a stock model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

import adapruner
from adapruner.checkpoint import save_checkpoint
from adapruner.planning import make_plan
from adapruner.structure import build_structure
from adapruner.surgery import prune_model

FAMILIES = ["llama", "gpt2", "phi3", "gemma3_text"]


@pytest.fixture
def save(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[[str], Path]:
    """Saves a model of a family, with layers of different sizes."""

    def save_family(family: str) -> Path:
        dense = make_model(family)
        structure = build_structure(dense)
        scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(8))
        counts = [max(1, block.groups - block.layer) for block in structure.blocks]
        pruned = prune_model(dense, structure, make_plan(structure, scores, counts))
        save_checkpoint(pruned, tokenizer, tmp_path / family)
        return tmp_path / family

    return save_family


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementations_agree(family: str, save: Callable[[str], Path], windows: torch.Tensor) -> None:
    model = adapruner.load(save(family))
    with torch.no_grad():
        logits = {}
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            logits[implementation] = model(windows).logits
            assert model.base_model.config._attn_implementation == implementation
        torch.testing.assert_close(*logits.values(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_generates_the_same(family: str, save: Callable[[str], Path], windows: torch.Tensor) -> None:
    model = adapruner.load(save(family))
    prompt = {"input_ids": windows[:2], "attention_mask": torch.ones_like(windows[:2])}
    greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "disable_compile": True}
    expected = model.generate(**prompt, **greedy, use_cache=False)
    assert torch.equal(model.generate(**prompt, **greedy, cache_implementation="static"), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_in_one_graph(family: str, save: Callable[[str], Path], windows: torch.Tensor) -> None:
    model = adapruner.load(save(family))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(windows, use_cache=False).logits, model(windows).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks for it
def test_adapters_are_trained_and_merged(save: Callable[[str], Path], windows: torch.Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = save("llama")
    model = adapruner.load(folder)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=2,
        learning_rate=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    samples = [{"input_ids": window, "labels": window} for window in windows]
    Trainer(adapted, arguments, train_dataset=samples).train()
    with torch.no_grad():
        trained = adapted(windows).logits
        merged = adapted.merge_and_unload()
        assert not torch.allclose(trained, adapruner.load(folder)(windows).logits, atol=1e-2)
        torch.testing.assert_close(merged(windows).logits, trained, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        for loaded in (
            adapruner.load(tmp_path / "merged"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True),
        ):
            assert torch.equal(loaded(windows).logits, merged(windows).logits)


def test_a_pipeline_generates(save: Callable[[str], Path]) -> None:
    folder = save("llama")
    model, tokenizer = adapruner.load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generate("w5 w6", max_new_tokens=4, min_new_tokens=4, max_length=None, do_sample=False)[0]["generated_text"]
    assert text.startswith("w5 w6")
    assert text.count("w") == 6


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_torchao_loads_int8_weights(
    layout: str,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    windows: torch.Tensor,
    tmp_path: Path,
) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    dense = make_model("llama")
    structure = build_structure(dense)
    counts = [block.groups - (block.layer if layout == "per-layer" else 1) % block.groups for block in structure.blocks]
    pruned = prune_model(dense, structure, make_plan(structure, torch.zeros(structure.group_offsets[-1]), counts))
    save_checkpoint(pruned, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        trust_remote_code=layout == "per-layer",
        quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
    )
    assert type(loaded.model.layers[1].mlp.down_proj.weight).__name__ != "Parameter"
    with torch.no_grad():
        expected, logits = pruned(windows).logits, loaded(windows).logits
    assert 0 < (logits - expected).abs().max() < 0.05 * expected.abs().max()


FINE_TUNE = """
import sys
sys.modules["adapruner"] = None  # as if it were not installed
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
tokens = torch.arange(3, 40).view(1, -1)
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(2):
    loss = adapted(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
assert losses[1] < losses[0], losses
"""


def test_fine_tunes_where_the_package_is_not_installed(save: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    finished = subprocess.run(
        [sys.executable, "-c", FINE_TUNE, str(save("llama"))],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PATH": ""},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr


def test_a_stock_class_refuses_a_per_layer_folder(save: Callable[[str], Path]) -> None:
    """Loudly, rather than with some of the weights drawn at random."""
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(save("llama"))
