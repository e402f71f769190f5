"""Over every known family: a uniform layout is a stock model; added biases come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import adapruner
from adapruner.checkpoint import save_checkpoint
from adapruner.measurement import measure_moments
from adapruner.models import known_architectures
from adapruner.planning import Budget, kept_counts, make_plan
from adapruner.structure import build_structure
from adapruner.surgery import Compensation, prune_model


@pytest.fixture(params=known_architectures())
def dense(request: pytest.FixtureRequest, make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model(request.param)


def cut(
    dense: PreTrainedModel, windows: torch.Tensor, head_share: float, form: str | None, layout: str = "uniform"
) -> PreTrainedModel:
    structure = build_structure(dense)
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    budget = Budget(0.25 if head_share else 0.12, 0, 0, head_share, layout=layout)
    plan = make_plan(structure, scores, kept_counts(structure, budget))
    moments = measure_moments(dense, structure, windows, range(len(structure.blocks)))
    return prune_model(dense, structure, plan, Compensation(form, moments) if form else None)


@pytest.mark.parametrize("head_share", [0.0, 1.0])
@pytest.mark.parametrize("form", [None, "least-squares"])
def test_a_uniform_layout_is_read_by_stock_transformers(
    head_share: float,
    form: str | None,
    dense: PreTrainedModel,
    windows: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    pruned = cut(dense, windows, head_share, form)
    assert type(pruned) is type(dense)
    assert (pruned.config.num_attention_heads < 6) == bool(head_share)
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.py"))
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path / "model"), adapruner.load(tmp_path / "model")):
        with torch.no_grad():
            assert torch.equal(loaded(windows).logits, pruned(windows).logits)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("form", ["bias", "least-squares-bias"])
def test_added_biases_are_saved_and_loaded(
    layout: str,
    form: str,
    dense: PreTrainedModel,
    windows: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    pruned = cut(dense, windows, 1.0, form, layout)
    biases = [layer.get_submodule(path).bias for layer in pruned.model.layers for path in pruned.config.added_biases]
    assert len(biases) == 8
    assert any(bias.any() for bias in biases)
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(adapruner.load(tmp_path / "model")(windows).logits, pruned(windows).logits)


def test_numbers_of_heads_that_a_stock_config_refuses(
    make_model: Callable[..., PreTrainedModel],
    windows: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """5 heads do not divide a hidden size of 48: the model is uniform, but not a stock one."""
    dense = make_model("llama", 6)
    structure = build_structure(dense)
    counts = [5 if block.kind == "heads" else 20 for block in structure.blocks]
    pruned = prune_model(dense, structure, make_plan(structure, torch.ones(structure.group_offsets[-1]), counts))
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(adapruner.load(tmp_path / "model")(windows).logits, pruned(windows).logits)
