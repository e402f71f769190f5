"""Predicted sizes of GGUF files against files that are written, by this package and by llama.cpp's quantizer."""

from collections.abc import Callable

import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from transformers import PreTrainedModel

from adapruner.budget.counts import Budget, Profile, kept_counts
from adapruner.budget.plan import make_plan
from adapruner.checkpoint import save_checkpoint
from adapruner.gguf.checks import LLAMA_LIKE
from adapruner.gguf.write import gguf_bytes, write_gguf
from adapruner.model.loading import empty_model
from adapruner.options import PruneConfig, SizeLimit
from adapruner.run.options import ratio_within
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model

MakeModel = Callable[..., PreTrainedModel]


def cut(model: PreTrainedModel, step: int) -> PreTrainedModel:
    """Without channels, in steps; where llama.cpp supports it, fewer in every other layer."""
    structure = build_structure(model)
    layers_may_differ = model.config.model_type in LLAMA_LIKE
    counts = [
        block.groups - step * (1 + block.layer % 2 * layers_may_differ) if block.kind == "channels" else block.groups
        for block in structure.blocks
    ]
    plan = make_plan(structure, torch.zeros(structure.group_offsets[-1]), counts)
    return prune_model(model, structure, plan)


@pytest.mark.parametrize("gguf_type", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sizes_are_those_of_files_that_are_written(family, gguf_type, tiny, bytes_tokenizer, tmp_path):
    # Rows of 96 fit into blocks, those of 20 and 16 channels do not.
    model = tiny(family, hidden_size=96, num_hidden_layers=12, tie_word_embeddings=family == "qwen3")
    smaller = cut(model, 4)
    write_gguf(smaller, bytes_tokenizer, tmp_path / "model.gguf", gguf_type)
    written = (tmp_path / "model.gguf").stat().st_size
    assert gguf_bytes(empty_model(smaller.config), bytes_tokenizer, gguf_type) == written


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen3", True)])
@pytest.mark.parametrize("hidden", [256, 288])
def test_q4_k_m_is_as_large_as_llama_cpp_makes_it(family, tied, hidden, tiny, bytes_tokenizer, tmp_path):
    library = pytest.importorskip("cyllama.llama.llama_cpp")
    model = tiny(
        family,
        key_value_heads=4,
        num_attention_heads=8,
        hidden_size=hidden,
        num_hidden_layers=12,
        tie_word_embeddings=tied,
    )
    smaller = cut(widened(model, 768), 128)
    write_gguf(smaller, bytes_tokenizer, tmp_path / "model.gguf", "f32")
    parameters = library.LlamaModelQuantizeParams()
    parameters.ftype, parameters.nthread = int(LlamaFileType.MOSTLY_Q4_K_M), 1
    library.model_quantize(str(tmp_path / "model.gguf"), str(tmp_path / "q4.gguf"), parameters)
    types = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "q4.gguf").tensors}
    assert {"Q4_K", "Q6_K", "Q5_0", "Q8_0"} & types
    written = (tmp_path / "q4.gguf").stat().st_size
    assert gguf_bytes(empty_model(smaller.config), bytes_tokenizer, "q4_k_m") == written


@pytest.mark.parametrize("gguf_type", ["f16", "q8_0", "q4_k_m"])
def test_a_limit_holds_for_every_file_of_its_ratio(gguf_type, tiny, bytes_tokenizer, tmp_path):
    """Rows that are cut no longer fit into blocks of 256, and the layers differ in their bits."""
    model = tiny(
        "llama",
        key_value_heads=4,
        num_attention_heads=8,
        hidden_size=256,
        num_hidden_layers=12,
        tie_word_embeddings=True,
    )
    model = widened(model, 768)
    save_checkpoint(model, bytes_tokenizer, tmp_path / "model")
    limit = int(0.85 * gguf_bytes(model, bytes_tokenizer, gguf_type))
    config = PruneConfig.from_options(model=str(tmp_path / "model"), for_=("llama.cpp",))
    ratio = ratio_within(SizeLimit(size=str(limit), gguf_type=gguf_type), config)
    structure, sizes = build_structure(model), []
    for profile in (Profile(0, 0), Profile(4, 3), Profile(2, 5), Profile(0, 5), Profile(5, 0), Profile(3, 0)):
        for heads in (0.0, 0.5):
            counts = kept_counts(structure, Budget(ratio, profile, heads, round_to=32))
            plan = make_plan(structure, torch.zeros(structure.group_offsets[-1]), counts)
            sizes.append(gguf_bytes(prune_model(model, structure, plan), bytes_tokenizer, gguf_type))
    assert 0.85 * limit <= max(sizes) <= limit


def widened(model: PreTrainedModel, channels: int) -> PreTrainedModel:
    """The same with random weights and more channels."""
    config = model.config
    config.intermediate_size = channels
    torch.manual_seed(0)
    return type(model)(config)
