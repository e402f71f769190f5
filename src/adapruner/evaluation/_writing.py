"""Text that models write: greedy and sampled continuations, and the predictions of a model for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase as Tokenizer,
)

from adapruner.calibration import prompts
from adapruner.evaluation._losses import tokens_per_batch
from adapruner.evaluation._speed import new_cache

# The most tokens of every continuation.
_CONTINUED = 128
_TEMPERATURE = 0.7
# Processors need many rows to be fast; on a device, memory is scarcer.
_PROMPTS_AT_ONCE, _PROMPTS_ON_DEVICE = 48, 16
WRITING_PROTOCOL = f"at most {_CONTINUED} tokens, greedy or sampled at temperature {_TEMPERATURE}"
# Tokens after which texts that have ended are left.
_AT_ONCE = 16
# Where a row has no token.
_NONE = -1

# Texts by the kind of their prompts and the way of writing, such as `openings, greedy`: [texts, tokens], int64. The
# last `_CONTINUED` columns are what the model wrote, up to and including a token that ends the text.
Written = dict[str, Tensor]


class Text(NamedTuple):
    """The tokens of a prompt and of its continuation."""

    prompt: list[int]
    continuation: list[int]


class _Sampling(LogitsProcessor):
    """Leaves one token to each of some rows, a sample at the temperature; others stay as they are.

    So greedy and sampled texts are generated in one batch, and the random state of the process stays as it is.
    """

    def __init__(self, rows: Tensor, generator: torch.Generator) -> None:
        self.rows, self.generator = rows, generator

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        rows = self.rows.to(scores.device, non_blocking=True)
        summed = (scores[rows] / _TEMPERATURE).softmax(-1).cumsum(-1)
        drawn = torch.rand(len(summed), 1, generator=self.generator).to(scores.device, non_blocking=True)
        # The sum may be a little more than its last term where the vocabulary is large, or no number.
        chosen = torch.searchsorted(summed, drawn * summed[:, -1:], right=True).clamp(max=summed.shape[1] - 1)
        return scores.index_copy(0, rows, torch.full_like(summed, -math.inf).scatter(1, chosen, 0.0))


def write(model: PreTrainedModel, tokenizer: Tokenizer) -> Written:
    """The texts that a model writes after the built-in prompts (`calibration.prompts`).

    Prompts are padded on the left. Where the model has few positions, prompts take at most half of them, from which
    they are cut on the left, and continuations end with the last position.

    Returns:
        The same for the same model on the same machine; of its generation settings, only the end tokens count.
    """
    asked = prompts(tokenizer)
    room = getattr(model.config, "max_position_embeddings", None) or math.inf
    tokens = [prompt for by_text in asked.values() for prompt in by_text.values()]
    longest = int(min(max(map(len, tokens)), room // 2))
    cut = [torch.tensor(prompt[-longest:]) for prompt in tokens]
    rows = torch.stack([functional.pad(prompt, (longest - len(prompt), 0), value=_NONE) for prompt in cut])
    new_tokens, ends = int(min(_CONTINUED, room - longest)), end_tokens(model, tokenizer)
    parts = [
        _continue(model, part, new_tokens, ends, seed)
        for seed, part in enumerate(rows.split(_PROMPTS_AT_ONCE if model.device.type == "cpu" else _PROMPTS_ON_DEVICE))
    ]
    greedy, sampled = (torch.cat([rows, torch.cat(continued)], 1) for continued in zip(*parts, strict=True))
    counts = [len(by_text) for by_text in asked.values()]
    return {
        f"{kind}, {way}": texts.clone()
        for way, written in (("greedy", greedy), ("sampled", sampled))
        for kind, texts in zip(asked, written.split(counts), strict=True)
    }


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text, for the tokenizer or in the generation settings of the model."""
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    # Configs of small models may name one that their vocabulary does not have.
    return sorted(end for end in ends if end is not None and 0 <= end < model.config.vocab_size)


def _continue(
    model: PreTrainedModel, prompts: Tensor, new_tokens: int, ends: list[int], seed: int
) -> tuple[Tensor, Tensor]:
    """Greedy and sampled continuations, [prompts, _CONTINUED] each, int64.

    Args:
        prompts: [prompts, tokens], int64.
    """
    rows = prompts.repeat(2, 1)
    written = torch.full((len(rows), _CONTINUED), _NONE)
    [cache_name], last = new_cache(model), torch.tensor(ends, dtype=torch.long)
    numbers, cache, generator = torch.arange(len(rows)), None, torch.Generator().manual_seed(seed)
    for first in range(0, new_tokens, _AT_ONCE):
        settings = GenerationConfig(
            max_new_tokens=min(_AT_ONCE, new_tokens - first),
            eos_token_id=ends or None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        sampling = _Sampling((numbers >= len(prompts)).nonzero().flatten(), generator)
        generated = _generate(model, rows, settings, sampling, {} if cache is None else {cache_name: cache})
        continued, cache = generated.sequences[:, rows.shape[1] :].cpu(), generated.get(cache_name)
        written[numbers, first : first + continued.shape[1]] = continued
        rows = torch.cat([rows, continued], 1)
        going_on = ~torch.isin(rows[:, -first - continued.shape[1] :], last).any(1)
        if not going_on.any():
            break
        # Caches of some hybrids cannot drop rows.
        if cache is None or all(hasattr(layer, "batch_select_indices") for layer in cache.layers):
            rows, numbers = rows[going_on], numbers[going_on]
            if cache is not None:
                cache.batch_select_indices(going_on.nonzero().flatten().to(model.device))
    is_end = torch.isin(written, last).long()
    written[is_end.cumsum(1) > is_end] = _NONE
    greedy, sampled = written.chunk(2)
    return greedy, sampled


def _generate(
    model: PreTrainedModel, rows: Tensor, settings: GenerationConfig, sampling: _Sampling, cache: dict[str, Any]
) -> Any:
    """What `generate` returns, with these settings alone."""
    generate: Any = model.generate
    # What they leave open is taken from those of the model.
    of_model, model.generation_config = model.generation_config, settings
    try:
        return generate(
            rows.clamp(min=0).to(model.device),
            attention_mask=(rows != _NONE).long().to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([sampling]),
            **cache,
        )
    finally:
        model.generation_config = of_model


def texts_of(written: Tensor) -> list[Text]:
    """The texts without padding."""
    halves = written[:, :-_CONTINUED], written[:, -_CONTINUED:]
    tokens = ([row[row != _NONE].tolist() for row in half] for half in halves)
    return [Text(*pair) for pair in zip(*tokens, strict=True)]


@torch.inference_mode()
def read(model: PreTrainedModel, texts: Sequence[Text]) -> list[tuple[Tensor, Tensor]]:
    """For every token of each continuation, given all tokens before: the negative log-likelihood in nats, float32, and
    the token that the model predicts, int64.

    Rows are padded on the right, which needs no mask, and cut on the left where the model has few positions. Texts that
    differ in their last token alone are one row.
    """
    room = getattr(model.config, "max_position_embeddings", None) or 0
    texts_of_row: dict[tuple[int, ...], list[int]] = {}
    for number, (prompt, continuation) in enumerate(texts):
        texts_of_row.setdefault((*prompt, *continuation[:-1])[-room:], []).append(number)
    rows = sorted(texts_of_row, key=len, reverse=True)
    readings: dict[int, tuple[Tensor, Tensor]] = {}
    while rows:
        at_once = max(1, tokens_per_batch(model.device) // len(rows[0]))
        batch, rows = rows[:at_once], rows[at_once:]
        tokens = torch.tensor([(*row, *[0] * (len(batch[0]) - len(row))) for row in batch], device=model.device)
        numbers = [number for row in batch for number in texts_of_row[row]]
        written = [torch.tensor(texts[number].continuation, dtype=torch.long) for number in numbers]
        lengths = [len(continuation) for continuation in written]
        predicted = model(input_ids=tokens, use_cache=False).logits
        targets = iter(torch.cat(written).to(predicted.device).split(lengths))
        losses, chosen = [], []
        # Text by text: float32 logits of a batch are the largest thing in memory.
        for row, logits in zip(batch, predicted, strict=True):
            for _ in texts_of_row[row]:
                target = next(targets)
                predictions = logits[len(row) - len(target) : len(row)].float()
                losses.append(functional.cross_entropy(predictions, target, reduction="none"))
                chosen.append(predictions.argmax(-1))
        both = (torch.cat(parts).cpu().split(lengths) for parts in (losses, chosen))
        readings |= dict(zip(numbers, zip(*both, strict=True), strict=True))
    return [readings[number] for number in range(len(texts))]
