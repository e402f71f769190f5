"""How large, how fast: parameters, multiplications, memory, tokens per second; models side by side in one process."""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from adapruner.models import empty_model
from adapruner.structure import build_structure

# Widths that matrix units take whole: vector registers of a processor, tiles of a GPU's tensor cores.
_FRIENDLY_MULTIPLES = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True)
class Rate:
    """Tokens per second: the median over repetitions, the least and the greatest."""

    median: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Speed:
    """What a model costs to run.

    Attributes:
        parameters: tied ones counted once.
        weight_bytes: of these.
        prompt_macs, generated_macs: multiply-accumulates per token of the prompt, and per generated token after it.
        peak_memory_bytes: weights and the most that was held beyond them; None where it cannot be told.
        prefill, decode: rates of reading a prompt and of generating after it, by batch size.
        unfriendly_widths: feed-forward widths that are no multiple of `friendly_multiple`, by layer.
    """

    parameters: int
    weight_bytes: int
    prompt_macs: int
    generated_macs: int
    peak_memory_bytes: int | None
    prefill: dict[int, Rate]
    decode: dict[int, Rate]
    unfriendly_widths: dict[int, int]
    friendly_multiple: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    batch_sizes: Sequence[int] = (1, 16),
    prompt: int = 128,
    generated: int = 32,
    repetitions: int = 5,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Speed]:
    """Measures models in turn, so that whatever else the machine does meets all of them.

    Args:
        models: by name, all on the same device.
        prompt: tokens that are read at once; as in `generate`, only the last one's prediction is computed.
        generated: tokens that are then generated one by one with a cache.
        progress: called after every measurement, `len(models) · len(batch_sizes) · (repetitions + 1)` times.
    """
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    peaks: dict[str, int | None] = {}
    for repetition in range(repetitions + 1):
        for batch_size in batch_sizes:
            for name, model in models.items():
                if repetition == 0 and batch_size == max(batch_sizes):
                    peaks[name] = _peak_beyond_weights(model, partial(_run, model, batch_size, prompt, generated))
                else:
                    times = _run(model, batch_size, prompt, generated)
                    if repetition:  # the first is to warm up
                        seconds.setdefault((name, batch_size), []).append(times)
                if progress:
                    progress(1)
    return {
        name: _speed(model, {b: seconds[name, b] for b in batch_sizes}, peaks[name], prompt, generated)
        for name, model in models.items()
    }


def count_macs(model: PreTrainedModel, prompt: int) -> tuple[int, int]:
    """Multiply-accumulates of all matrix products: per token of a prompt of that length, of which only the last
    prediction is computed, and of the token generated after it."""
    empty = empty_model(model.config).eval()
    tokens = torch.zeros(1, prompt, dtype=torch.long, device="meta")
    cache = _new_cache(empty)
    with torch.no_grad():
        with FlopCounterMode(display=False) as of_prompt:
            empty(tokens, use_cache=True, logits_to_keep=1, **cache)
        with FlopCounterMode(display=False) as of_next:
            empty(tokens[:, :1], use_cache=True, **cache)
    return of_prompt.get_total_flops() // 2 // prompt, of_next.get_total_flops() // 2


def _speed(
    model: PreTrainedModel, seconds: dict[int, list[tuple[float, float]]], peak: int | None, prompt: int, generated: int
) -> Speed:
    weights = {parameter.data_ptr(): parameter for parameter in model.parameters()}.values()
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in weights)
    prompt_macs, generated_macs = count_macs(model, prompt)
    multiple = _FRIENDLY_MULTIPLES.get(model.device.type, 64)
    blocks = build_structure(model).blocks
    return Speed(
        parameters=sum(parameter.numel() for parameter in weights),
        weight_bytes=weight_bytes,
        prompt_macs=prompt_macs,
        generated_macs=generated_macs,
        peak_memory_bytes=None if peak is None else weight_bytes + peak,
        prefill={batch: _rate(batch * prompt, [own[0] for own in times]) for batch, times in seconds.items()},
        decode={batch: _rate(batch * generated, [own[1] for own in times]) for batch, times in seconds.items()},
        unfriendly_widths={
            block.layer: block.groups for block in blocks if block.kind == "channels" and block.groups % multiple
        },
        friendly_multiple=multiple,
    )


def _rate(tokens: int, seconds: list[float]) -> Rate:
    return Rate(tokens / statistics.median(seconds), tokens / max(seconds), tokens / min(seconds))


def _run(model: PreTrainedModel, batch_size: int, prompt: int, generated: int) -> tuple[float, float]:
    """Seconds of reading prompts and of generating after them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch_size, prompt), generator=generator).to(model.device)
    cache = _new_cache(model)
    with torch.inference_mode():
        started = _now(model.device)
        logits = model(tokens, use_cache=True, logits_to_keep=1, **cache).logits
        read = _now(model.device)
        for _ in range(generated):
            logits = model(logits[:, -1:].argmax(-1), use_cache=True, **cache).logits
        return read - started, _now(model.device) - read


def _new_cache(model: PreTrainedModel) -> dict[str, DynamicCache]:
    """An empty cache by the name that this version of transformers has for it."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: DynamicCache()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_beyond_weights(model: PreTrainedModel, run: Callable[[], Any]) -> int | None:
    """The most memory that a run takes beyond what was held before; None where the system does not tell."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        run()
        return torch.cuda.max_memory_allocated(model.device) - before
    resettable = Path("/proc/self/clear_refs")
    if not resettable.exists():
        run()
        return None
    gc.collect()
    resettable.write_text("5")  # Linux: the peak starts again from here
    held = _resident("VmRSS")
    run()
    return _resident("VmHWM") - held


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024
