"""Text that a model writes: continuations of prompts, greedy and sampled ones in one batch."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase as Tokenizer,
)

from adapruner.base.errors import AdaPrunerError
from adapruner.model.architecture import architecture_of
from adapruner.model.layers import is_streamed

# Where a row has no token.
NO_TOKEN = -1
# Rows of a batch: a processor is fastest with many (research/experiments/writing-speed.md). Its tokens, whose keys and
# values are in memory, which is scarcer on a device.
_MOST_ROWS, _MOST_TOKENS, _MOST_TOKENS_ON_DEVICE = 128, 32768, 8192
# Bytes of the keys and values of batches that a streamed model continues together.
_MOST_CACHED = 8 * 2**30
# Tokens after which rows that have ended are dropped.
_CHECKED_EVERY = 16
# The most queries of a head for which matrix products are used: those of a token, and not those of a prompt.
_FEW_QUERIES = 16


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text, for the tokenizer or in the generation settings of the model."""
    named: object = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    # Configs of small models may name one that their vocabulary does not have.
    return sorted(end for end in ends if end is not None and 0 <= end < model.config.vocab_size)


def check_prompts(config: PreTrainedConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Refuses a prompt longer than `max_position_embeddings`."""
    longest, positions = max(map(len, prompts), default=0), getattr(config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise AdaPrunerError(
            f"a prompt of {longest:,} tokens does not fit the {positions:,} positions of this {config.model_type}:"
            " shorten it, or lower `seq_len`"
        )


def continue_texts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperatures: Tensor,
    seed: int,
    ends: Sequence[int] = (),
    advance: Callable[[float], None] | None = None,
) -> Tensor:
    """Continues prompts with what a model predicts. Its generation settings and the random state of the process neither
    count nor change. Where its positions end, so do the texts: with the longest prompt.

    A streamed model continues many batches together, so that its layers are read once for a token of all of them. Each
    batch has its own random numbers: the texts are those of a model in memory, but for rounding.

    Args:
        temperatures: [prompts], float32: divides the logits that a text is sampled from; 0 takes the largest.
        ends: tokens that end a text.
        advance: called after every token of a batch, with the fraction of its continuations that this is, times the
            number of its prompts.

    Returns:
        [prompts, tokens of the longest prompt + `new_tokens`], int64, the same for the same seed on the same machine:
        each prompt, padded on the left, and its continuation up to and including a token that ends it; `NO_TOKEN`
        before and after. Logits that are not finite give any tokens.
    """
    check_prompts(model.config, prompts)
    longest, positions = max(map(len, prompts)), getattr(model.config, "max_position_embeddings", None) or math.inf
    padded = torch.full((len(prompts), longest + new_tokens), NO_TOKEN)
    for row, prompt in zip(padded, prompts, strict=True):
        row[longest - len(prompt) : longest] = torch.tensor(prompt)
    length = int(min(longest + new_tokens, positions))
    batches = torch.arange(len(prompts)).split(texts_at_once(len(prompts), length, model.device))
    generators, generator = list[torch.Generator](), torch.Generator().manual_seed(seed)
    for batch in batches:
        generators += [generator.clone_state()] * len(batch)
        # It moves on as if this batch drew a number for every token.
        torch.rand(length - longest, int(temperatures[batch].count_nonzero()), generator=generator)
    size = len(batches[0])
    together = batches_together(model.config, size, length, model.dtype) if is_streamed(model) else 1
    for first in range(0, len(batches), together):
        numbers = torch.cat(batches[first : first + together])
        generators_of_rows = [generators[number] for number in numbers]

        def step(tokens: int, share: float = len(numbers) / max(1, length - longest)) -> None:
            if advance:
                advance(tokens * share)

        padded[numbers, :length] = _continue(
            model, padded[numbers, :longest], length, temperatures[numbers], generators_of_rows, ends, step
        )
    return padded


def texts_at_once(count: int, length: int, device: torch.device) -> int:
    """The number of texts in a batch, out of a number of texts with so many tokens."""
    room = _MOST_TOKENS if device.type == "cpu" else _MOST_TOKENS_ON_DEVICE
    batches = math.ceil(count / max(1, min(_MOST_ROWS, room // length)))
    return math.ceil(count / batches)


def batches_together(config: PreTrainedConfig, texts: int, length: int, dtype: torch.dtype) -> int:
    """The number of batches, each of so many texts of so many tokens, that a streamed model continues together, whose
    keys and values have this dtype: at least one."""
    return max(1, _MOST_CACHED // (texts * length * architecture_of(config).cached(config) * dtype.itemsize))


def _continue(
    model: PreTrainedModel,
    prompts: Tensor,
    length: int,
    temperatures: Tensor,
    generators: Sequence[torch.Generator],
    ends: Sequence[int],
    step: Callable[[int], None],
) -> Tensor:
    """[prompts, length], int64: prompts with their continuations; `step` gets the number of tokens that all prompts
    have been continued by."""
    rows, numbers, longest = prompts, torch.arange(len(prompts)), prompts.shape[1]
    written = functional.pad(prompts, (0, length - longest), value=NO_TOKEN)
    last, caches = torch.tensor(ends, dtype=torch.int64), dict[str, Any]()
    while rows.shape[1] < length:
        left = length - rows.shape[1]
        settings = GenerationConfig(
            max_new_tokens=min(_CHECKED_EVERY, left) if ends else left,
            eos_token_id=[*ends] or None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        sampling = _Sampling(temperatures[numbers].to(model.device), [generators[number] for number in numbers], step)
        # Settings that are left open are taken from those of the model.
        settings_of_model, model.generation_config = model.generation_config, settings
        try:
            with _FastAttention() if model.device.type == "cpu" else contextlib.nullcontext():
                generated = cast(Any, model).generate(
                    rows.clamp(min=0).to(model.device),
                    attention_mask=(rows != NO_TOKEN).long().to(model.device),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([sampling]),
                    **caches,
                )
        finally:
            model.generation_config = settings_of_model
        rows = torch.cat([rows, generated.sequences[:, rows.shape[1] :].cpu()], 1)
        written[numbers, : rows.shape[1]] = rows
        going_on = ~torch.isin(rows[:, longest:], last).any(1)
        if not going_on.any():
            step(length - rows.shape[1])
            break
        caches = {name: value for name, value in generated.items() if isinstance(value, Cache)}
        for cache in caches.values():
            cache.reorder_cache(going_on.nonzero().flatten().to(model.device))
        rows, numbers = rows[going_on], numbers[going_on]
    is_end = torch.isin(written[:, longest:], last).long()
    written[:, longest:][is_end.cumsum(1) > is_end] = NO_TOKEN
    return written


class _Sampling(LogitsProcessor):
    """Gives the largest logit to a token that is sampled, in rows whose temperature is not 0.

    So greedy and sampled texts are generated in one batch, without the random state of the process or of a device, and
    much faster than by `torch.multinomial`.

    Args:
        temperatures: [rows].
        generators: of the random numbers of each row; rows that share one follow each other.
        step: called with 1 for every token.
    """

    def __init__(
        self,
        temperatures: Tensor,
        generators: Sequence[torch.Generator],
        step: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.step = step
        self.rows = temperatures.nonzero().flatten()
        self.counts = Counter(generators[row] for row in self.rows.tolist())
        self.temperatures = temperatures[self.rows, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        self.step(1)
        summed = scores[self.rows].div_(self.temperatures).softmax(-1).cumsum(-1)
        numbers = [torch.rand(count, 1, generator=generator) for generator, count in self.counts.items()]
        drawn = torch.cat([torch.empty(0, 1), *numbers]).to(scores.device, non_blocking=True)
        # The sum may be a little more than its last term where the vocabulary is large, or no number.
        chosen = torch.searchsorted(summed, drawn * summed[:, -1:], right=True).clamp(max=summed.shape[1] - 1)
        return scores.index_put_((self.rows[:, None], chosen), scores.new_full((), math.inf))


class _FastAttention(TorchFunctionMode):
    """On a processor, attention of few queries as two matrix products, like that of transformers' `eager`: the kernel
    of PyTorch is made for many queries and takes five times as long."""

    def __torch_function__(self, call: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> object:
        kwargs = kwargs or {}
        is_attention = call is functional.scaled_dot_product_attention and not kwargs.get("is_causal")
        if is_attention and args[0].shape[-2] <= _FEW_QUERIES:
            return _attend(*args, **kwargs)
        return call(*args, **kwargs)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, **_: object
) -> Tensor:
    """The result of `scaled_dot_product_attention` without dropout, [batch, heads, queries, features].

    Args:
        query: [batch, heads, queries, features].
        key, value: [batch, KV heads, keys, features].
        attn_mask: [batch or 1, heads or 1, queries, keys]: true for the keys that are seen, or a bias.
    """
    batch, heads, queries, features = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, features)
    scores = (grouped @ key.transpose(-1, -2)).reshape(batch, heads, queries, -1).float() * (scale or features**-0.5)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1).to(value.dtype).reshape(batch, key.shape[1], -1, key.shape[2])
    return (weights @ value).reshape(batch, heads, queries, -1)
