"""A per-layer checkpoint in the hands of other libraries: everything that is done with a stock model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import adapruner
from adapruner.checkpoint import save_checkpoint
from tiny_families import cut_to

FAMILIES = ["llama", "gpt2", "phi3", "gemma3_text"]


@pytest.fixture
def save(make_model, tokenizer, tmp_path):
    """Saves a model of a family, with layers of different sizes."""

    def save_family(family: str) -> Path:
        save_checkpoint(cut_to(make_model(family)), tokenizer, tmp_path / family)
        return tmp_path / family

    return save_family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_generates_the_same(family, save, windows):
    model = adapruner.load(save(family))
    prompt = {"input_ids": windows[:2], "attention_mask": torch.ones_like(windows[:2])}
    greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "disable_compile": True}
    expected = model.generate(**prompt, **greedy, use_cache=False)
    assert torch.equal(model.generate(**prompt, **greedy, cache_implementation="static"), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_in_one_graph(family, save, windows):
    model = adapruner.load(save(family))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(windows, use_cache=False).logits, model(windows).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks for it
def test_adapters_are_trained_and_merged(save, windows, tmp_path):
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


def test_a_stock_class_refuses_a_per_layer_folder(save):
    """Loudly, rather than with some of the weights drawn at random."""
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(save("llama"))
