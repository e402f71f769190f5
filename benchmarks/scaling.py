"""How the memory of measuring grows with the number of layers, with all layers in memory and layer by layer.

Makes "Growth" of research/results.md. Takes about 10 minutes.

    python benchmarks/scaling.py

Random Llamas, float32. Every point is a process of its own; its memory is the peak beyond what the process held before
the model was loaded. Statistics layer by layer are compared with those of the whole model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from cyclopts import run
from transformers import LlamaConfig, LlamaForCausalLM

from adapruner.measurement.taylor import measure
from adapruner.model.loading import load_model
from adapruner.model.places import find_model
from adapruner.structure.build import build_structure
from machine import MIB, describe, memory, reset_peak

HIDDEN, SAMPLES, TOKENS = 1024, 4, 128


def main(*, layers: tuple[int, ...] = (8, 32), point: str | None = None) -> None:
    """Prints peaks; `point` is for the processes that this one starts."""
    if point is not None:
        print(json.dumps(measure_point(**json.loads(point))))
        return
    print(describe())
    for layer_wise in (False, True):
        for count in layers:
            command = [sys.executable, __file__, "--point", json.dumps({"layers": count, "layer_wise": layer_wise})]
            measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            way = "layer by layer" if layer_wise else "all layers in memory"
            peak, weights = (measured[name] / MIB for name in ("peak", "weights"))
            print(f"{count} layers, {way}: peak {peak:.0f} MiB, weights {weights:.0f} MiB", flush=True)
    print(f"largest relative difference of the statistics: {difference():.1e}")


def measure_point(layers: int, layer_wise: bool) -> dict[str, float]:
    """The peak and the weights, in bytes."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        write(Path(folder), layers, HIDDEN)
        # Everything that is loaded once is there before the peak counts.
        measure_folder(Path(folder), 1, layer_wise)
        reset_peak()
        before = memory("VmRSS")
        weights = measure_folder(Path(folder), SAMPLES, layer_wise)
        return {"peak": memory("VmHWM") - before, "weights": weights}


def measure_folder(folder: Path, samples: int, layer_wise: bool) -> int:
    """Measures random tokens; returns the bytes of the weights."""
    model = load_model(find_model(str(folder)), layer_wise=layer_wise)
    tokens = torch.randint(0, 1000, (samples, TOKENS), generator=torch.Generator().manual_seed(0))
    measure(model, build_structure(model), tokens, layer_wise=layer_wise)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def difference() -> float:
    """Between statistics of the whole model in memory and of one layer at a time out of files."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), 16, 256)
        tokens = torch.randint(0, 1000, (4, TOKENS), generator=torch.Generator().manual_seed(0))
        whole, streamed = (
            measure(model, build_structure(model), tokens, layer_wise=layer_wise)
            for layer_wise in (False, True)
            for model in [load_model(find_model(folder), layer_wise=layer_wise)]
        )
    return max(
        float((values - streamed.per_sample[name]).norm() / values.norm()) for name, values in whole.per_sample.items()
    )


def write(folder: Path, layers: int, hidden: int) -> None:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    run(main)
