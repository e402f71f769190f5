"""Answers of the teacher to prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from adapruner.random_state import random_state_kept

# Where a row has no token.
NONE = -1
# Greedy answers of small models repeat themselves; at temperature 1, they are often wrong.
_TEMPERATURE = 0.7
_PROMPTS_AT_ONCE = 16


def generate_answers(
    model: PreTrainedModel,
    prompts: list[list[int]],
    ends: list[int],
    seq_len: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Prompts with the answers that a model writes to them, sampled at temperature 0.7, up to and including a token
    that ends the text.

    Args:
        prompts: tokens; each shorter than `seq_len`.
        ends: the tokens that end a text.
        progress: called with the number of answers after every batch.

    Returns:
        [prompts, seq_len], int64, padded with -1 on the right; the same for the same seed on the same machine.
    """
    rows = torch.full((len(prompts), seq_len), NONE)
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    with random_state_kept():
        torch.manual_seed(seed)
        for first in range(0, len(prompts), _PROMPTS_AT_ONCE):
            numbers = by_length[first : first + _PROMPTS_AT_ONCE]
            answers = _answers(model, [prompts[number] for number in numbers], ends, seq_len)
            for number, answer in zip(numbers, answers, strict=True):
                tokens = torch.cat([torch.tensor(prompts[number]), answer])[:seq_len]
                rows[number, : len(tokens)] = tokens
            if progress:
                progress(len(numbers))
    return rows


def _answers(model: PreTrainedModel, prompts: list[list[int]], ends: list[int], seq_len: int) -> list[Tensor]:
    longest = max(map(len, prompts))
    padded = torch.stack(
        [functional.pad(torch.tensor(prompt), (longest - len(prompt), 0), value=NONE) for prompt in prompts]
    )
    settings = GenerationConfig(
        do_sample=True,
        temperature=_TEMPERATURE,
        top_k=0,
        top_p=1.0,
        max_new_tokens=seq_len - longest,
        eos_token_id=ends or None,
        pad_token_id=0,
    )
    generate: Any = model.generate
    # What they leave open is taken from those of the model.
    of_model, model.generation_config = model.generation_config, settings
    try:
        written = generate(
            padded.clamp(min=0).to(model.device),
            attention_mask=(padded != NONE).long().to(model.device),
            generation_config=settings,
            # A model that breaks on its text is found where the text is read.
            remove_invalid_values=True,
        )
    finally:
        model.generation_config = of_model
    answers = written[:, longest:].cpu()
    is_end = torch.isin(answers, torch.tensor(ends, dtype=torch.long)).long()
    return [answer[ended.cumsum(0) <= ended] for answer, ended in zip(answers, is_end, strict=True)]
