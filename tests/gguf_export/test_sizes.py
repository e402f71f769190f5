"""Predicted sizes of GGUF files against files that are written, by this package and by llama.cpp's quantizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adapruner.costs._bytes import size_costs
from adapruner.gguf import LLAMA_LIKE, gguf_bytes, write_gguf
from adapruner.models import empty_model
from adapruner.planning import make_plan
from adapruner.structure import build_structure
from adapruner.surgery import prune_model

MakeModel = Callable[..., PreTrainedModel]


def cut(model: PreTrainedModel, step: int) -> tuple[PreTrainedModel, list[int]]:
    """Without channels, in steps; where llama.cpp supports it, fewer in every other layer."""
    structure = build_structure(model)
    layers_may_differ = model.config.model_type in LLAMA_LIKE
    counts = [
        block.groups - step * (1 + block.layer % 2 * layers_may_differ) if block.kind == "channels" else block.groups
        for block in structure.blocks
    ]
    plan = make_plan(structure, torch.zeros(structure.group_offsets[-1]), counts)
    return prune_model(model, structure, plan), counts


@pytest.mark.parametrize("gguf_type", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sizes_are_those_of_files_that_are_written(
    family: str, gguf_type: Any, tiny: MakeModel, bytes_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # Rows of 96 fit into blocks, those of 20 and 16 channels do not.
    model = tiny(family, hidden_size=96, num_hidden_layers=12, tie_word_embeddings=family == "qwen3")
    smaller, counts = cut(model, 4)
    write_gguf(smaller, bytes_tokenizer, tmp_path / "model.gguf", gguf_type)
    written = (tmp_path / "model.gguf").stat().st_size
    assert gguf_bytes(empty_model(smaller.config), bytes_tokenizer, gguf_type) == written
    empty = empty_model(model.config)
    gguf: Any = f"gguf:{gguf_type}"
    costs = size_costs(empty, build_structure(empty), gguf, torch.float32, bytes_tokenizer)
    # Costs count the header of the dense file. If layers differ, the header has lists.
    assert 0 <= written - costs(counts) < 200


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen3", True)])
@pytest.mark.parametrize("hidden", [256, 288])
def test_q4_k_m_is_as_large_as_llama_cpp_makes_it(
    family: str, tied: bool, hidden: int, tiny: MakeModel, bytes_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    library = pytest.importorskip("cyllama.llama.llama_cpp")
    model = tiny(
        family,
        key_value_heads=4,
        num_attention_heads=8,
        hidden_size=hidden,
        num_hidden_layers=12,
        tie_word_embeddings=tied,
    )
    smaller, _ = cut(widened(model, 768), 128)
    write_gguf(smaller, bytes_tokenizer, tmp_path / "model.gguf", "f32")
    parameters = library.LlamaModelQuantizeParams()
    parameters.ftype, parameters.nthread = int(LlamaFileType.MOSTLY_Q4_K_M), 1
    library.model_quantize(str(tmp_path / "model.gguf"), str(tmp_path / "q4.gguf"), parameters)
    types = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "q4.gguf").tensors}
    assert {"Q4_K", "Q6_K", "Q5_0", "Q8_0"} & types
    written = (tmp_path / "q4.gguf").stat().st_size
    assert gguf_bytes(empty_model(smaller.config), bytes_tokenizer, "q4_k_m") == written


def widened(model: PreTrainedModel, channels: int) -> PreTrainedModel:
    """The same with random weights and more channels."""
    config = model.config
    config.intermediate_size = channels
    torch.manual_seed(0)
    return type(model)(config)
