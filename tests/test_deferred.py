"""Models whose weights stay in their files until they are needed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from adapruner.model.loading import copy_in_dtype, load_model
from adapruner.model.places import find_model
from adapruner.model.stored import deferred_by_module, read_all
from tiny_families import tiny_config

Saved = Callable[..., Path]


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Writes a random model of a family."""

    def save(model_type: str, **changes: object) -> Path:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).save_pretrained(tmp_path)
        return tmp_path

    return save


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), ("gemma3_text", {}), ("gpt2", {}), ("mixtral", {})],
    ids=lambda value: str(value or ""),
)
def test_a_deferred_model_has_the_weights_of_its_files(model_type, changes, saved):
    folder = find_model(str(saved(model_type, **changes)))
    deferred, loaded = load_model(folder, deferred=True), load_model(folder)
    assert sum(weight.untyped_storage().nbytes() for weight in deferred.parameters()) < 4 * 100
    read_all(deferred)
    assert not deferred_by_module(deferred)
    expected, state = loaded.state_dict(), deferred.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert [*map(id, deferred.parameters())] != [*map(id, loaded.parameters())]
    assert len(list(deferred.parameters())) == len(list(loaded.parameters()))  # tied ones are one
    assert {name: torch.equal(buffer, loaded.get_buffer(name)) for name, buffer in deferred.named_buffers()} == dict(
        dict.fromkeys(dict(loaded.named_buffers()), True)
    )


def test_a_copy_in_another_dtype_is_deferred_too(saved):
    folder = find_model(str(saved("llama", tie_word_embeddings=True)))
    model = load_model(folder, deferred=True)
    copied = copy_in_dtype(model, torch.bfloat16)
    assert copied.dtype == torch.bfloat16
    assert copied.get_input_embeddings().weight is copied.get_output_embeddings().weight
    read_all(copied)
    expected = load_model(folder, "bfloat16").state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in copied.state_dict().items())
    assert deferred_by_module(model)


def test_an_output_matrix_of_its_own_is_kept(saved):
    """The config ties it to the embedding."""
    folder = saved("llama", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    deferred = load_model(find_model(str(folder)), deferred=True)
    read_all(deferred)
    assert torch.equal(deferred.get_output_embeddings().weight, model.lm_head.weight)
