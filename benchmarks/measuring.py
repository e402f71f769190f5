"""What the measuring pass costs: its time against a forward pass, and its peak memory beyond weights and activations.

    python benchmarks/measuring.py

Time: forward over the same windows without gradients, in the same process, alternating. Memory: three processes of the
same batch; `activations` is the peak of a training step (everything recorded that weight gradients need) without a loss
and without making weight gradients. Linux only: the peak is reset through /proc.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from cyclopts import run

from adapruner.measurement import measure_in_parts
from adapruner.models import find_model, load_model
from adapruner.structure import build_structure

MIB = 2**20


def main(
    *,
    model: str = "smollm2",
    windows: int = 64,
    length: int = 128,
    batch_size: int = 4,
    repetitions: int = 3,
    memory_of: Literal["activations", "measuring"] | None = None,
) -> None:
    """Prints both ratios; `memory_of` is for the processes that this one starts."""
    torch.manual_seed(0)
    loaded = load_model(find_model(model))
    structure = build_structure(loaded)
    tokens = torch.randint(0, loaded.config.vocab_size, (windows, length))

    def measure() -> None:
        for _ in measure_in_parts(loaded, structure, tokens, batch_size):
            pass

    if memory_of is not None:
        tokens = tokens[: 2 * batch_size]
        _reset_peak()
        before = _memory("VmRSS")
        if memory_of == "measuring":
            measure()
        else:
            for batch in tokens.split(batch_size):
                embedded = loaded.get_input_embeddings()(batch).detach().requires_grad_()
                logits = loaded(inputs_embeds=embedded, use_cache=False).logits
                torch.autograd.grad(logits, embedded, grad_outputs=logits.detach())
        print(json.dumps(_memory("VmHWM") - before))
        return

    def forward() -> None:
        with torch.no_grad():
            for batch in tokens.split(batch_size):
                loaded(batch, use_cache=False)

    forward()
    times = [(_seconds(forward), _seconds(measure)) for _ in range(repetitions)]
    ratios = [measured / forwarded for forwarded, measured in times]
    print(
        f"{windows} windows of {length}: forward {statistics.median(t[0] for t in times):.1f} s, measuring"
        f" {statistics.median(t[1] for t in times):.1f} s, ratio {statistics.median(ratios):.2f}"
        f" ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    weights = sum(p.numel() * p.element_size() for p in loaded.parameters())
    peak = {}
    for kind in ("activations", "measuring"):
        command = [sys.executable, __file__, "--model", model, "--length", str(length)]
        command += ["--batch-size", str(batch_size), "--memory-of", kind]
        peak[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    extra = peak["measuring"] - peak["activations"]
    print(
        f"weights {weights / MIB:.0f} MiB; peak beyond them: activations {peak['activations'] / MIB:.0f} MiB, measuring"
        f" {peak['measuring'] / MIB:.0f} MiB; measuring beyond both: {extra / MIB:+.0f} MiB,"
        f" {extra / weights:+.1%} of the weights"
    )


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _reset_peak() -> None:
    """Gives freed memory back and lets the peak of the process start from what it holds now."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


if __name__ == "__main__":
    run(main)
