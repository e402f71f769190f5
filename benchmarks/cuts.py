"""Which cut buys which speed: the same share of the parameters, taken as widths, attentions, layers.

    python benchmarks/cuts.py --folder runs/cuts

Which groups go is drawn at random, because speed depends on shapes alone. Measured in transformers, the models in turn,
and in llama.cpp with weights in bfloat16.
"""

from __future__ import annotations

import json
import statistics
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from cyclopts import run as run_benchmark

from adapruner.checkpoint import save_checkpoint
from adapruner.evaluation import measure_speed
from adapruner.models import find_model, load_model, load_tokenizer
from adapruner.planning import Budget, Profile, kept_counts, make_plan
from adapruner.structure import build_structure
from adapruner.surgery import prune_model
from adapruner.verbs import export
from machine import describe

ATTENTIONS = tuple(range(6, 24, 3))
LAYERS = tuple(range(9, 21, 2))


def budgets(ratio: float) -> dict[str, Budget | None]:
    return {
        "dense": None,
        "fewer channels per layer": Budget(ratio, Profile(bend=0.8), round_to=32),
        "fewer channels, all layers alike": Budget(ratio, "uniform", round_to=32),
        f"{len(ATTENTIONS)} attentions, the rest channels": Budget(ratio, round_to=32, without_attention=ATTENTIONS),
        f"{len(LAYERS)} layers, the rest channels": Budget(
            ratio, "uniform", round_to=32, without_attention=LAYERS, without_feed_forward=LAYERS
        ),
    }


def main(*, folder: Path, model: str = "smollm2", ratio: float = 0.2, repetitions: int = 5) -> None:
    """
    Args:
        folder: Where the models are written.
        ratio: Of the parameters.
        repetitions: Of every measurement.
    """
    print(describe())
    location = find_model(model)
    dense, tokenizer = load_model(location, "bfloat16"), load_tokenizer(location)
    structure = build_structure(dense)
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    models, files = {}, {}
    for number, (name, budget) in enumerate(budgets(ratio).items()):
        plan = make_plan(structure, scores, kept_counts(structure, budget)) if budget else None
        models[name] = prune_model(dense, structure, plan) if plan else dense
        save_checkpoint(models[name], tokenizer, folder / str(number))
        files[name] = folder / f"{number}.gguf"
        export(folder / str(number), "gguf", files[name], gguf_type="bf16", overwrite=True)
    for name, speed in measure_speed(models, repetitions=repetitions).items():
        rates = [("prompt", batch, rate) for batch, rate in speed.prefill.items()]
        rates += [("new", batch, rate) for batch, rate in speed.decode.items()]
        shown = ", ".join(f"{what} {rate.median:.0f} at batch {batch}" for what, batch, rate in rates)
        print(f"{name}: {speed.parameters:,} parameters; transformers: {shown} tokens per second", flush=True)
    for name, file in files.items():
        prompt, new = in_llama_cpp(file, repetitions)
        print(f"{name}: llama.cpp: prompt {prompt:.0f}, new {new:.0f} tokens per second", flush=True)


def in_llama_cpp(file: Path, repetitions: int) -> tuple[float, float]:
    """Medians of tokens per second, of a prompt of 128 tokens and of 64 new ones."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 256, 1, -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 2
    server = xllamacpp.Server(parameters)
    timings: list[dict[str, Any]] = []
    for repetition in range(repetitions + 1):
        prompt = list(range(100 + repetition, 228 + repetition))
        body = {"prompt": prompt, "n_predict": 64, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        request = urllib.request.Request(
            f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            timings.append(json.load(response)["timings"])
    measured = timings[1:]
    prompt_rate, new_rate = (
        statistics.median(each[name] for each in measured) for name in ("prompt_per_second", "predicted_per_second")
    )
    return prompt_rate, new_rate


if __name__ == "__main__":
    run_benchmark(main)
