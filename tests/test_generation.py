"""Continuations of prompts, against a loop without a cache, a batch or padding."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.families.inference import random_model
from adapruner.model import generation as _generation
from adapruner.model.generation import NO_TOKEN, continue_texts
from tiny_families import tiny_config

PROMPTS = [[11, 12, 13], [15], [24, 7, 8, 54, 65, 6, 11, 34, 35, 74], [9, 10]]


def continued_alone(model: PreTrainedModel, tokens: list[int], count: int, ends: Sequence[int] = (2,)) -> list[int]:
    """Greedy, without a cache, a batch or padding."""
    written: list[int] = []
    while len(written) < count and not {*ends} & {*written}:
        with torch.no_grad():
            written.append(int(model(torch.tensor([tokens + written])).logits[0, -1].argmax()))
    return written


def greedy(model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int, ends: Sequence[int] = ()) -> Tensor:
    return continue_texts(model, prompts, count, torch.zeros(len(prompts)), 0, ends)


def tokens_of(rows: Tensor) -> list[list[int]]:
    return [row[row != NO_TOKEN].tolist() for row in rows]


@pytest.fixture
def _batches_are_small(monkeypatch):
    monkeypatch.setattr(_generation, "_MOST_ROWS", 3)
    monkeypatch.setattr(_generation, "_CHECKED_EVERY", 5)  # those that have ended are dropped


@pytest.mark.usefixtures("_batches_are_small")
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "mistral", "opt"])
def test_padded_prompts_are_continued_as_each_alone(family, make_model):
    model, ends = make_model(family), [*range(2, 96, 8)]
    rows = greedy(model, PROMPTS, 24, ends)
    assert rows.shape == (4, 10 + 24)
    assert tokens_of(rows[:, :10]) == PROMPTS
    assert tokens_of(rows[:, 10:]) == [continued_alone(model, prompt, 24, ends) for prompt in PROMPTS]


@pytest.mark.usefixtures("_batches_are_small")
@pytest.mark.parametrize(
    "family", ["bamba", "falcon_h1", "gpt_oss", "jamba", "lfm2", "mixtral", "qwen3_next", "recurrent_gemma"]
)
def test_caches_of_every_kind_continue_texts(family):
    model, ends = random_model(tiny_config(family)).eval(), [*range(2, 256, 16)]
    assert tokens_of(greedy(model, PROMPTS, 24, ends)[:, 10:]) == [
        continued_alone(model, prompt, 24, ends) for prompt in PROMPTS
    ]


def test_greedy_and_sampled_texts_are_written_together(model):
    state, temperatures = torch.get_rng_state(), torch.tensor([0.0, 1.0] * 4)
    steps: list[float] = []
    texts = continue_texts(model, PROMPTS * 2, 12, temperatures, 7, advance=steps.append)
    assert steps == [pytest.approx(8 / 12)] * 12
    assert torch.equal(texts[::2], greedy(model, PROMPTS * 2, 12)[::2])
    assert not torch.equal(texts[1], texts[5])
    assert torch.equal(texts, continue_texts(model, PROMPTS * 2, 12, temperatures, 7))
    again = continue_texts(model, PROMPTS * 2, 12, temperatures, 8)
    assert torch.equal(texts[::2], again[::2])
    assert not torch.equal(texts[1::2], again[1::2])
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_have_the_probabilities_at_the_temperature():
    logits, temperatures = torch.tensor([0.0, 1.0, -1.0, 2.0]), torch.tensor([0.0, 0.7]).repeat_interleave(20_000)
    sampling = _generation._Sampling(temperatures, [torch.Generator().manual_seed(0)] * len(temperatures))
    scores = sampling(None, logits.repeat(40_000, 1))
    assert torch.equal(scores[:20_000], logits.repeat(20_000, 1))
    shares = scores[20_000:].argmax(-1).bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, (logits / 0.7).softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_texts_end_with_the_last_position(family, make_model):
    model = make_model(family)
    rows = greedy(model, [[11] * 40, [12] * 50], 30)
    assert tokens_of(rows[:, 50:]) == [
        continued_alone(model, [11] * 40, 14, ()),
        continued_alone(model, [12] * 50, 14, ()),
    ]


def test_a_model_that_predicts_no_numbers_writes_any_tokens(model):
    torch.nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
    rows = continue_texts(model, PROMPTS, 4, torch.tensor([0.0, 1.0, 0.0, 1.0]), 0)
    assert ((rows[:, 10:] >= 0) & (rows[:, 10:] < 96)).all()


# Each changes what `generate` returns by default, or ends it with an error.
SETTINGS: dict[str, object] = {
    "bad_words_ids": [[token] for token in range(3, 90)],
    "begin_suppress_tokens": [*range(3, 90)],
    "cache_implementation": "quantized",
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 50.0,
    "eos_token_id": [*range(3, 90)],
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "guidance_scale": 30.0,
    "max_length": 2,
    "max_new_tokens": 2,
    "max_time": 1e-9,
    "min_p": 0.9,
    "no_repeat_ngram_size": 1,
    "num_beams": 2,
    "num_return_sequences": 2,
    "output_scores": True,
    "prompt_lookup_num_tokens": 3,
    "repetition_penalty": 50.0,
    "return_dict_in_generate": True,
    "sequence_bias": [[[7], 100.0]],
    "stop_strings": ["w1"],
    "suppress_tokens": [*range(3, 90)],
    "temperature": 0.01,
    "top_h": 0.1,
    "top_k": 1,
    "top_p": 0.1,
    "typical_p": 0.1,
    "use_cache": False,
    "watermarking_config": {"bias": 50.0, "seeding_scheme": "lefthash"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_generation_setting_of_a_model_counts(name, model):
    def written() -> torch.Tensor:
        return continue_texts(model, [[1]] * 4, 11, torch.ones(4), seed=0)

    expected = written()
    setattr(model.generation_config, name, SETTINGS[name])
    model.generation_config.do_sample = True
    settings = model.generation_config
    assert torch.equal(written(), expected)
    assert model.generation_config is settings


def test_a_prompt_beyond_the_positions_is_refused(make_model):
    model = make_model(max_position_embeddings=10)
    assert tokens_of(greedy(model, PROMPTS, 4)) == PROMPTS  # the longest leaves no room for more
    with pytest.raises(AdaPrunerError, match="a prompt of 11 tokens does not fit the 10 positions of this llama"):
        greedy(model, [*PROMPTS, [5] * 11], 4)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("mask", ["none", "true for the keys that are seen", "a bias"])
@pytest.mark.parametrize("groups", [1, 3])
def test_fast_attention_is_that_of_pytorch(queries, mask, groups):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, 6, queries, 8),
        torch.randn(2, 6 // groups, 9, 8),
        torch.randn(2, 6 // groups, 9, 4),
    )
    masks = {"none": None, "a bias": torch.randn(2, 1, queries, 9)}
    attn_mask = masks.get(mask, torch.rand(2, 1, queries, 9) > 0.3)
    for scale in (None, 0.7):
        options = {"attn_mask": attn_mask, "scale": scale, "enable_gqa": groups > 1}
        expected = functional.scaled_dot_product_attention(query, key, value, **options)
        with _generation._FastAttention():
            attended = functional.scaled_dot_product_attention(query, key, value, **options)
        torch.testing.assert_close(attended, expected)
        assert not torch.equal(attended, expected)
