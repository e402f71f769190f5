"""Size and speed: parameters, multiplications, memory, tokens per second; models side by side in one process."""

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from pydantic import BaseModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from adapruner.base.progress import held_memory, peak_memory, reset_peak_memory
from adapruner.model.architecture import new_model

# Tokens of a prompt, and tokens generated after it, unless others are given.
SPEED_TOKENS = 128, 32


class Rate(BaseModel, frozen=True):
    """Tokens per second: the median over repetitions, the least and the greatest."""

    median: float
    least: float
    greatest: float


class Speed(BaseModel, frozen=True):
    """The cost of running a model.

    Attributes:
        parameters: tied ones counted once.
        weight_bytes: bytes of these parameters.
        prompt_macs, new_token_macs: multiply-accumulates per token of the prompt, and per generated token after it.
        peak_memory_bytes: weights and the most memory held beyond them at the largest batch size; None if the system
            does not report it.
        prefill, decode: rates of reading a prompt and of generating after it, by batch size.
    """

    parameters: int
    weight_bytes: int
    prompt_macs: int
    new_token_macs: int
    peak_memory_bytes: int | None
    prefill: dict[int, Rate]
    decode: dict[int, Rate]


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    batch_sizes: Sequence[int] = (1, 16),
    prompt: int = SPEED_TOKENS[0],
    new_tokens: int = SPEED_TOKENS[1],
    repetitions: int = 5,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Speed]:
    """Measures models in turn, so that other load on the machine affects all of them: once to warm up, once for peak
    memory at the largest batch size, and then for time.

    Args:
        models: by name, all on the same device.
        prompt: tokens that are read at once; as in `generate`, only the prediction after the last one is computed.
        new_tokens: tokens that are then generated one by one with a cache.
        progress: called after every measurement, `len(models) · (len(batch_sizes) · (repetitions + 1) + 1)` times.
    """

    def run(name: str, batch_size: int) -> tuple[float, float]:
        times = _run(models[name], batch_size, prompt, new_tokens)
        if progress:
            progress(1)
        return times

    cases = [(name, batch_size) for batch_size in batch_sizes for name in models]
    for case in cases:  # to warm up: weights that are mapped from files are read
        run(*case)
    peaks = {name: _peak_beyond_weights(model, partial(run, name, max(batch_sizes))) for name, model in models.items()}
    rounds = [{case: run(*case) for case in cases} for _ in range(repetitions)]
    speeds = {}
    for name, model in models.items():
        # The tied ones are counted once.
        weights = {parameter.data_ptr(): parameter for parameter in model.parameters()}.values()
        weight_bytes, peak = sum(parameter.numel() * parameter.element_size() for parameter in weights), peaks[name]
        prompt_macs, new_token_macs = count_macs(model, prompt)
        seconds = {size: [times[name, size] for times in rounds] for size in batch_sizes}
        speeds[name] = Speed(
            parameters=sum(parameter.numel() for parameter in weights),
            weight_bytes=weight_bytes,
            prompt_macs=prompt_macs,
            new_token_macs=new_token_macs,
            peak_memory_bytes=None if peak is None else weight_bytes + peak,
            prefill={size: _rate(size * prompt, [read for read, _ in times]) for size, times in seconds.items()},
            decode={size: _rate(size * new_tokens, [new for _, new in times]) for size, times in seconds.items()},
        )
    return speeds


def count_macs(model: PreTrainedModel, prompt: int) -> tuple[int, int]:
    """Multiply-accumulates of all matrix products: per token of a prompt, whose last prediction alone is computed, and
    for the token generated after it.

    Args:
        prompt: tokens.
    """
    with torch.device("meta"):
        empty = new_model(model.config).eval()
    tokens = torch.zeros(1, prompt, dtype=torch.long, device="meta")
    cache = new_cache(empty)
    with torch.no_grad():
        with FlopCounterMode(display=False) as prompt_counter:
            empty(tokens, use_cache=True, logits_to_keep=1, **cache)
        with FlopCounterMode(display=False) as next_counter:
            empty(tokens[:, :1], use_cache=True, **cache)
    return prompt_counter.get_total_flops() // 2 // prompt, next_counter.get_total_flops() // 2


def _rate(tokens: int, seconds: Sequence[float]) -> Rate:
    """Tokens per second, given the seconds of each repetition."""
    return Rate(median=tokens / statistics.median(seconds), least=tokens / max(seconds), greatest=tokens / min(seconds))


def _run(model: PreTrainedModel, batch_size: int, prompt: int, new_tokens: int) -> tuple[float, float]:
    """Seconds for reading prompts, and for generating after them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch_size, prompt), generator=generator).to(model.device)
    cache = new_cache(model)
    with torch.inference_mode():
        started = now(model.device)
        logits = model(tokens, use_cache=True, logits_to_keep=1, **cache).logits
        read = now(model.device)
        for _ in range(new_tokens):
            logits = model(logits[:, -1:].argmax(-1), use_cache=True, **cache).logits
        return read - started, now(model.device) - read


def new_cache(model: PreTrainedModel, config: PreTrainedConfig | None = None) -> dict[str, DynamicCache]:
    """An empty cache, under the name of the argument in this version of transformers.

    Args:
        config: of the model, for a cache that holds only the tokens that its layers attend to, as in `generate`.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: DynamicCache(config=config)}


def now(device: torch.device) -> float:
    """Seconds of a clock, when all work on a device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _peak_beyond_weights(model: PreTrainedModel, run: Callable[[], object]) -> int | None:
    """The most memory that a run needs beyond the memory held before; None if the system does not report it."""
    if model.device.type != "cpu":
        accelerator = torch.get_device_module(model.device)
        accelerator.reset_peak_memory_stats(model.device)
        before = accelerator.memory_allocated(model.device)
        run()
        return int(accelerator.max_memory_allocated(model.device) - before)
    gc.collect()
    if not reset_peak_memory():
        run()
        return None
    held = held_memory()
    run()
    return max(0, peak_memory() - held)
