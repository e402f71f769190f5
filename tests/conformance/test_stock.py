"""Over every known family: layers of different sizes, padded with zeros, are a stock model that computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from adapruner.checkpoint import save_checkpoint
from adapruner.errors import AdaPrunerError
from adapruner.families import learn
from adapruner.families.proof import masked
from adapruner.families.tiny import random_model, tiny_config as shrunk_config
from adapruner.measurement import measure_moments
from adapruner.models import find_model, known_architectures, load_model
from adapruner.planning import make_plan
from adapruner.structure import build_structure, count_parameters
from adapruner.surgery import Compensation, is_as_large_as_dense, pad_to_stock, prune_model
from tiny_families import random_plan, tiny_config

CASES = [
    (family, key_value_heads, granularity)
    for family, architecture in known_architectures().items()
    for key_value_heads, granularity in ((3, "kv-group"), (3, "query-head"), (6, "kv-group"))
    if key_value_heads == 6 or architecture.config_fields.key_value_heads
]


# A norm over all heads adds its epsilon to the mean of the squares, which zeros make smaller.
FIELDS = {"olmo2": {"rms_norm_eps": 1e-9}}


@pytest.mark.parametrize("least_lost", [0, 1])
@pytest.mark.parametrize(("family", "key_value_heads", "granularity"), CASES)
def test_padded_equals_pruned(
    family: str,
    key_value_heads: int,
    granularity: str,
    least_lost: int,
    make_model: Callable[..., PreTrainedModel],
    windows: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """Also where no layer stays whole, so that the padded model is smaller than the dense one."""
    dense = make_model(family, key_value_heads, num_hidden_layers=12, **FIELDS.get(family, {}))
    structure = build_structure(dense, granularity)
    counts = [
        block.strata * max(1, block.groups // block.strata - least_lost - block.layer) for block in structure.blocks
    ]
    pruned = prune_model(dense, structure, random_plan(structure, counts))
    padded = pad_to_stock(pruned)
    assert count_parameters(pruned) < count_parameters(padded) <= count_parameters(dense)
    assert is_as_large_as_dense(padded, pruned) == (count_parameters(padded) == count_parameters(dense))
    save_checkpoint(padded, tokenizer, tmp_path / "stock")
    assert not list((tmp_path / "stock").glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    with torch.no_grad():
        torch.testing.assert_close(stock(windows).logits, pruned(windows).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "key_value_heads", "granularity"), CASES)
def test_fewer_heads_in_all_layers_are_filled_up_to_the_hidden_size(
    family: str,
    key_value_heads: int,
    granularity: str,
    make_model: Callable[..., PreTrainedModel],
    windows: torch.Tensor,
) -> None:
    """For loaders that take the hidden size, divided by the heads, for the width of a head."""
    dense = make_model(family, key_value_heads, **FIELDS.get(family, {}))
    structure = build_structure(dense, granularity)
    counts = [block.groups - block.strata if block.kind == "heads" else block.groups // 2 for block in structure.blocks]
    pruned = prune_model(dense, structure, random_plan(structure, counts))
    padded = pad_to_stock(pruned, fills_heads=True)
    names, structure = known_architectures()[family].config_fields, build_structure(padded)
    heads, groups = (getattr(padded.config, name or names.heads) for name in (names.heads, names.key_value_heads))
    widths = {block.inputs / heads for block in structure.blocks if block.kind == "heads"}
    assert widths == {padded.config.hidden_size / heads}
    assert heads % groups == 0
    with torch.no_grad():
        torch.testing.assert_close(padded(windows).logits, pruned(windows).logits, rtol=1e-4, atol=1e-4)


def test_twelve_layers_that_differ_in_the_dense_model(
    windows: torch.Tensor, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of this Gemma 4, every sixth layer has other heads; transformers writes its number as "05" and "11"."""
    others = {layer: {"head_dim": 32, "num_key_value_heads": 1} for layer in (5, 11)}
    kinds = ["full_attention" if layer in others else "sliding_attention" for layer in range(12)]
    layers = {"num_hidden_layers": 12, "num_kv_shared_layers": 0, "layer_types": kinds, "per_layer_config": others}
    config = tiny_config("gemma4_text", **layers)
    shrunk = shrunk_config(config)
    assert shrunk.layer_types == ["sliding_attention", "full_attention"] * 2
    assert shrunk.to_dict()["per_layer_config"] == {layer: {"num_key_value_heads": 1} for layer in "13"}
    learn(config)
    dense = random_model(config)
    structure = build_structure(dense)
    counts = [block.groups - block.layer * (block.kind == "channels") for block in structure.blocks]
    plan = make_plan(structure, torch.zeros(structure.group_offsets[-1]), counts)
    save_checkpoint(prune_model(dense, structure, plan), tokenizer, tmp_path / "pruned")
    loaded = load_model(find_model(str(tmp_path / "pruned")))
    with torch.no_grad(), masked(dense, structure, plan) as same:
        expected = same(windows).logits
        for model in (loaded, pad_to_stock(loaded)):
            torch.testing.assert_close(model(windows).logits, expected, rtol=1e-3, atol=1e-3)


def test_added_biases_have_no_place(model: PreTrainedModel, windows: torch.Tensor) -> None:
    with pytest.raises(AdaPrunerError, match="least-squares"):
        pad_to_stock(pruned_with_bias(model, windows))


def pruned_with_bias(model: PreTrainedModel, windows: torch.Tensor) -> PreTrainedModel:
    structure = build_structure(model)
    moments = dict(measure_moments(model, structure, windows))
    counts = [max(1, block.groups - block.layer) for block in structure.blocks]
    plan = make_plan(structure, torch.ones(structure.group_offsets[-1]), counts)
    return prune_model(model, structure, plan, Compensation("bias", moments))
