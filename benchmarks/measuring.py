"""What the measuring pass costs: its time and its peak memory, against a forward pass and against plain autograd.

Makes "Measuring" of research/results.md. Takes about 15 minutes.

    python benchmarks/measuring.py

Time: forward over the same windows without gradients, in the same process, taking turns. Memory: a process for each
way, the same batch; `activations` is the peak of a training step (everything recorded that weight gradients need)
without a loss and without making weight gradients. `plain` is what LLM-Pruner does for all four terms: a backward pass
for every sample, whose squared gradients are summed up, and one over all for the gradient of the mean loss, both kept
whole for all weights. Linux only: the peak is reset through /proc.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from cyclopts import run
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.measurement.taylor import measure
from adapruner.model.loading import load_model
from adapruner.model.places import find_model
from adapruner.structure.blocks import Structure
from adapruner.structure.build import build_structure
from machine import MIB, describe, memory, reset_peak, seconds

Way = Literal["activations", "all terms", "layer by layer", "plain"]


def main(
    *,
    model: str = "smollm2",
    windows: int = 64,
    length: int = 128,
    batch_size: int = 4,
    repetitions: int = 3,
    memory_of: Way | None = None,
) -> None:
    """Prints all ratios; `memory_of` is for the processes that this one starts."""
    torch.manual_seed(0)
    loaded = load_model(find_model(model))
    structure = build_structure(loaded)
    tokens = torch.randint(0, loaded.config.vocab_size, (windows, length))
    ways: dict[Way, Callable[[Tensor], object]] = {
        "activations": lambda text: record_activations(loaded, text, batch_size),
        "all terms": lambda text: measure(loaded, structure, text, batch_size),
        "layer by layer": lambda text: measure(loaded, structure, text, batch_size, layer_wise=True),
        "plain": lambda text: keep_all_gradients(loaded, structure, text, batch_size),
    }
    if memory_of is not None:
        reset_peak()
        before = memory("VmRSS")
        ways[memory_of](tokens[: 2 * batch_size])
        print(json.dumps(memory("VmHWM") - before))
        return

    def forward() -> None:
        with torch.no_grad():
            for batch in tokens.split(batch_size):
                loaded(batch, use_cache=False)

    print(describe())
    forward()
    ratios: dict[Way, list[float]] = {way: [] for way in ways if way != "activations"}
    for _ in range(repetitions):
        own = seconds(forward)
        for way, times in ratios.items():
            times.append(seconds(partial(ways[way], tokens)) / own)
    print(f"{windows} windows of {length} tokens of {model}; forward {own:.1f} s")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in loaded.parameters())
    peak = {}
    for way in ways:
        command = [sys.executable, __file__, "--model", model, "--length", str(length)]
        command += ["--batch-size", str(batch_size), "--memory-of", way]
        peak[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"weights {weights / MIB:.0f} MiB; activations {peak['activations'] / MIB:.0f} MiB beyond them")
    for way, times in ratios.items():
        extra = peak[way] - peak["activations"]
        print(
            f"{way}: {statistics.median(times):.2f} forwards ({min(times):.2f} to {max(times):.2f}); memory beyond"
            f" weights and activations {extra / MIB:+.0f} MiB, {extra / weights:+.1%} of the weights"
        )


def record_activations(model: PreTrainedModel, tokens: Tensor, batch_size: int) -> None:
    """Forward and backward without weight gradients, all that they need recorded."""
    for batch in tokens.split(batch_size):
        embedded = model.get_input_embeddings()(batch).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        torch.autograd.grad(logits, embedded, grad_outputs=logits.detach())


def keep_all_gradients(model: PreTrainedModel, structure: Structure, tokens: Tensor, batch_size: int) -> list[Tensor]:
    """All four terms from whole gradients."""
    squares = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for window in tokens:
        model.zero_grad()
        model(window[None], labels=window[None], use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            squares[name].addcmul_(parameter.grad, parameter.grad, value=1 / len(tokens))
    model.zero_grad()
    for batch in tokens.split(batch_size):
        (model(batch, labels=batch, use_cache=False).loss * len(batch) / len(tokens)).backward()
    terms = []
    for part in (part for block in structure.blocks for part in block.matrices):
        weight, axis = model.get_parameter(part.parameter), 1 - part.stored_axis
        assert weight.grad is not None
        first = weight.grad * weight.detach()
        second = squares[part.parameter] * weight.detach().square()
        terms.append(torch.stack([first.sum(axis).abs(), first.abs().sum(axis), second.sum(axis)]))
    model.zero_grad()
    return terms


if __name__ == "__main__":
    run(main)
