"""Quantizations that llama.cpp makes itself: another llama.cpp runs them, and they say what they are."""

import importlib.util
from collections import Counter
from statistics import fmean
from typing import get_args

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from adapruner.base.errors import AdaPrunerError
from adapruner.formats.gguf import write_gguf
from adapruner.formats.gguf_checks import read_stored_types
from adapruner.model.config import load_config
from adapruner.model.loading import load_model
from adapruner.model.places import find_model
from adapruner.options import GgufType
from tiny_families import cut_to

# More than the tokenizer of these tests has.
VOCABULARY = 400
TYPES: tuple[GgufType, ...] = get_args(GgufType)


@pytest.fixture(params=[(LlamaConfig, "uniform"), (LlamaConfig, "per-layer"), (Qwen3Config, "uniform")])
def pruned(request):
    """Rows of 256 and of 512 weights, and of 300 in six matrices if layers differ."""
    torch.manual_seed(0)
    config_class, layout = request.param
    dense = AutoModelForCausalLM.from_config(
        config_class(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=600,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
            initializer_range=0.05,
        )
    ).eval()
    first = 300 if layout == "per-layer" else 512
    channels = [first] * 6 + [512] * 6
    return cut_to(dense, lambda block: channels[block.layer] if block.kind == "channels" else block.groups)


def widths(model: PreTrainedModel) -> set[int]:
    return {layer.mlp.down_proj.in_features for layer in model.model.layers}


def test_every_type_runs(pruned, bytes_tokenizer, llama_cpp, tmp_path):
    pytest.importorskip("cyllama")
    prompt = torch.randint(5, 300, (24,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = pruned(prompt[None]).logits[0, -1].log_softmax(-1)
    sizes = {}
    for gguf_type in TYPES:
        path = tmp_path / f"{gguf_type}.gguf"
        write_gguf(pruned, bytes_tokenizer, path, gguf_type)
        opened = llama_cpp(path)
        assert len(opened.generate([5, 6, 7], 4)) == 4
        predicted = opened.next_token_log_probabilities(prompt.tolist(), VOCABULARY)
        tolerance = 0.03 if gguf_type in ("f32", "f16", "bf16", "q8_0") else 0.5
        errors = [abs(value - float(expected[token])) for token, value in predicted.items()]
        assert fmean(errors) < tolerance
        sizes[gguf_type] = path.stat().st_size
    # From the widest to the narrowest type.
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".gguf"] == []


def test_says_which_matrices_fell_back(pruned, bytes_tokenizer, tmp_path):
    pytest.importorskip("cyllama")
    path = tmp_path / "model.gguf"
    write_gguf(pruned, bytes_tokenizer, path, "q4_k_m")
    stored = read_stored_types(path, "q4_k_m")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert sum(stored.tensor_bytes.values()) == sum(tensor.data.nbytes for tensor in tensors.values())
    odd = {
        name for name, tensor in tensors.items() if len(tensor.data.shape) == 2 and tensor.shape[0] not in (256, 512)
    }
    assert odd == ({f"blk.{layer}.ffn_down.weight" for layer in range(6)} if 300 in widths(pruned) else set())
    assert stored.fallbacks == Counter(tensors[name].tensor_type.name for name in odd)
    k_quants = [tensor.data.nbytes for tensor in tensors.values() if tensor.tensor_type.name.endswith("_K")]
    share = sum(k_quants) / sum(stored.tensor_bytes.values())
    assert (share > 0.9) == (not odd)
    assert stored.sentence.startswith(f"{share:.1%} of the bytes are in K-quants")


def test_no_such_type(tiny, bytes_tokenizer, tmp_path):
    with pytest.raises(AdaPrunerError, match="'q9': expected one of f32, f16"):
        write_gguf(tiny("llama"), bytes_tokenizer, tmp_path / "model.gguf", "q9")


def test_without_the_quantizer(tiny, bytes_tokenizer, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "adapruner.formats.gguf_checks.find_spec", lambda name: None if name == "cyllama" else found(name)
    )
    with pytest.raises(AdaPrunerError, match=r"pip install '\.\[gguf\]'"):
        write_gguf(tiny("llama"), bytes_tokenizer, tmp_path / "model.gguf", "q4_k_m")
    write_gguf(tiny("llama"), bytes_tokenizer, tmp_path / "model.gguf", "q8_0")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("is_native", [True, False])
def test_matrices_of_few_bits_are_loaded_in_bfloat16_where_that_is_native(
    is_native, bytes_tokenizer, tmp_path, monkeypatch
):
    """They are no more precise; those of eight bits are, and other machines would multiply it slowly."""
    pytest.importorskip("cyllama")
    monkeypatch.setattr("adapruner.model.config.computes_bfloat16_natively", lambda _: is_native)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, **sizes))
    for gguf_type, few_bits in (("q4_k_m", True), ("q5_k_m", True), ("q8_0", False), ("f16", False)):
        path = tmp_path / f"{gguf_type}.gguf"
        write_gguf(model, bytes_tokenizer, path, gguf_type)
        dtype = torch.bfloat16 if few_bits and is_native else torch.float32
        location = find_model(path)
        assert load_config(location).dtype == load_model(location).dtype == dtype
        assert load_model(location, "float32").dtype == torch.float32
