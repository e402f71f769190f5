"""The table in docs/reference/engines.md is what this suite finds: every cell that says "works" was tried just now."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from adapruner.base.errors import AdaPrunerError
from adapruner.checkpoint import save_checkpoint
from adapruner.formats.gguf import write_gguf
from adapruner.formats.gguf_checks import check_gguf
from adapruner.model.architecture import known_architectures
from run_helpers import byte_tokenizer
from tiny_families import cut_to

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "engines.md"
# By benchmarks/engines.py, whose results are in the document, and Qwen 2 by hand, with Qwen2.5-Coder-0.5B
# (research/results/elsewhere.json); vLLM is not run here.
RUN_WITH_FEWER_HEADS = ("llama", "mistral", "olmo2", "phi3", "qwen3")
RUN_WITH_ALL_HEADS = (*RUN_WITH_FEWER_HEADS, "gemma3_text", "gpt2", "gpt_neox", "qwen2")
RUN_WITH_REMOTE_CODE = (*RUN_WITH_FEWER_HEADS, "gemma3_text", "gpt_neox", "qwen2")
# As the released models are, which llama.cpp knows: without sliding windows, Gemma 3 with a full attention in every
# sixth layer, and Qwen 3 with tied embeddings.
AS_RELEASED: dict[str, dict[str, object]] = {
    "gemma3_text": {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": None, "layer_types": None},
}
# How many groups a layer loses, of 3 or 6 heads and of 24 or more channels.
LAYOUTS: dict[str, Callable[[str, int], int]] = {
    "uniform, fewer channels": lambda kind, layer: 8 * (kind == "channels"),
    "uniform, fewer heads too": lambda kind, layer: {"heads": 1, "channels": 8}[kind],
    "per layer": lambda kind, layer: min(layer, 2) if kind == "heads" else 2 * layer,
}


@pytest.mark.parametrize("family", known_architectures())
def test_the_table_says_what_works(family, make_model, windows, tmp_path):
    cells, tokenizer = [], byte_tokenizer()
    for number, (layout, lost) in enumerate(LAYOUTS.items()):
        # Of layers that differ, the numbers in the config have two digits.
        layers = 12 if layout == "per layer" else 6
        dense = make_model(family, vocab_size=300, num_hidden_layers=layers, **AS_RELEASED.get(family, {}))
        pruned = cut_to(dense, lambda block, lost=lost: block.groups - lost(block.kind, block.layer))
        folder = tmp_path / f"{number}"
        save_checkpoint(pruned, tokenizer, folder)
        stock = loads_in_transformers(pruned, folder, windows)
        cells.append(
            (stock, writes_gguf(pruned, tokenizer, tmp_path / f"{number}.gguf"), loads_in_vllm(family, folder))
        )
    equal, fewer_heads, different = cells
    assert different[0] == "no"
    assert equal[1] == fewer_heads[1]
    row = [f"`{family}`", equal[0], fewer_heads[0], equal[1], different[1], equal[2], fewer_heads[2], different[2]]
    line = f"| {' | '.join(row)} |"
    assert line in DOCUMENT.read_text().splitlines(), f"docs/reference/engines.md should say {line}"


def loads_in_transformers(pruned: PreTrainedModel, folder: Path, windows: torch.Tensor) -> str:
    """As a stock model, or with the modelling file in the folder."""
    has_code = bool(list(folder.glob("*.py")))
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=has_code)
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, pruned(windows).logits)
    return "no" if has_code else "works"


def writes_gguf(pruned: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> str:
    """What is written runs in llama.cpp: see tests/gguf_export."""
    try:
        check_gguf(pruned)
    except AdaPrunerError:
        return "no"
    write_gguf(pruned, tokenizer, path)
    return "works"


def loads_in_vllm(family: str, folder: Path) -> str:
    """vLLM's classes take a stock model as it is, but not all of them read the width of a head from the config."""
    config = json.loads((folder / "config.json").read_text())
    if any(folder.glob("*.py")):
        return "remote code" if family in RUN_WITH_REMOTE_CODE else "unknown"
    heads = config.get("num_attention_heads") or config["n_head"]
    has_all = heads * config["head_dim"] == (config.get("hidden_size") or config["n_embd"])
    if family in (RUN_WITH_ALL_HEADS if has_all else RUN_WITH_FEWER_HEADS):
        return "works"
    return "stock model" if has_all else "unknown"
