"""How time and memory grow: with layers, width, samples; and what measuring layer by layer holds.

    python benchmarks/scaling.py

Random Llamas, float32, four channels to one hidden. Every point is a process of its own. Time is that of measuring with
all terms, memory the peak beyond what the process held before the model was loaded; exponents are the slopes of
straight lines through the logarithms. Statistics layer by layer are compared with those of the whole model.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from cyclopts import run
from transformers import LlamaConfig, LlamaForCausalLM

from adapruner.measurement import measure
from adapruner.models import find_model, load_model
from adapruner.structure import build_structure
from machine import MIB, describe, memory, reset_peak, seconds

TOKENS = 128


def main(*, point: str | None = None) -> None:
    """Prints exponents and peaks; `point` is for the processes that this one starts."""
    if point is not None:
        print(json.dumps(measure_point(**json.loads(point))))
        return
    print(describe())
    base = {"layers": 8, "hidden": 256, "samples": 16, "layer_wise": False}
    for name, values in {"layers": (8, 16, 32), "hidden": (256, 512, 1024), "samples": (16, 32, 64)}.items():
        points = [in_a_process(base | {name: value}) for value in values]
        times = [each["seconds"] for each in points]
        print(
            f"time with {name} {values}: {', '.join(f'{t:.1f} s' for t in times)}; exponent {slope(values, times):.2f}"
        )
    for layer_wise in (False, True):
        points = [
            in_a_process({"layers": n, "hidden": 1024, "samples": 4, "layer_wise": layer_wise}) for n in (8, 16, 32)
        ]
        peaks = ", ".join(f"{each['peak'] / MIB:.0f} MiB" for each in points)
        way = "layer by layer" if layer_wise else "all layers in memory"
        print(f"peak with 8, 16, 32 layers, {way}: {peaks} (weights {points[-1]['weights'] / MIB:.0f} MiB with 32)")
    print(f"largest relative difference of the statistics: {difference():.1e}")


def in_a_process(point: Mapping[str, object]) -> dict[str, float]:
    command = [sys.executable, __file__, "--point", json.dumps(point)]
    measured: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return measured


def measure_point(layers: int, hidden: int, samples: int, layer_wise: bool) -> dict[str, float]:
    """Seconds and bytes."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        write(Path(folder), layers, hidden)
        # Everything that is loaded once is there before the peak counts.
        measure_folder(Path(folder), 1, layer_wise)
        reset_peak()
        before = memory("VmRSS")
        took, weights = measure_folder(Path(folder), samples, layer_wise)
        return {"seconds": took, "peak": memory("VmHWM") - before, "weights": weights}


def measure_folder(folder: Path, samples: int, layer_wise: bool) -> tuple[float, int]:
    model = load_model(find_model(str(folder)), layer_wise=layer_wise)
    structure = build_structure(model)
    tokens = torch.randint(0, 1000, (samples, TOKENS), generator=torch.Generator().manual_seed(0))
    took = seconds(lambda: measure(model, structure, tokens, layer_wise=layer_wise))
    return took, sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


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


def slope(values: tuple[int, ...], times: list[float]) -> float:
    x, y = [math.log(value) for value in values], [math.log(time) for time in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


if __name__ == "__main__":
    run(main)
