"""Predicted against measured speed: plans that the latency table says to be so many times as fast as the dense model.

    python benchmarks/targets.py

On a machine that does nothing else; the table is measured anew. Which groups are removed is random, because speed
depends on shapes alone. Every second target is met with three attentions removed whole beside channels.
"""

from __future__ import annotations

import time
from functools import partial

import torch
from cyclopts import run as run_benchmark
from transformers import PreTrainedModel

from adapruner.config import Dtype, Phase, PruneConfig
from adapruner.costs import layers_to_measure, measure_latencies, measured_model, timer
from adapruner.models import find_model, load_model
from adapruner.planning import Budget, Profile, Speed, Target, kept_counts, make_plan, reference_budget
from adapruner.structure import Structure, build_structure
from adapruner.surgery import prune_model
from machine import describe

CASES: tuple[tuple[Phase, int], ...] = (("prefill", 1), ("decode", 1), ("prefill", 16))
ATTENTIONS = (9, 15, 21)


def main(
    *,
    model: str = "smollm2",
    dtype: Dtype = "bfloat16",
    targets: tuple[float, ...] = (1.15, 1.3, 1.45),
    tokens: int = 128,
) -> None:
    """
    Args:
        dtype: Of the weights.
        targets: How many times as fast.
        tokens: Of the prompt.
    """
    print(describe())
    dense = load_model(find_model(model), dtype)
    structure = build_structure(dense)
    for phase, batch in CASES:
        compare(dense, structure, phase, batch, tokens, targets)


def compare(
    dense: PreTrainedModel, structure: Structure, phase: Phase, batch: int, tokens: int, targets: tuple[float, ...]
) -> None:
    time_models, time_to_report = timer(phase, batch, tokens), timer(phase, batch, tokens, is_reported=True)
    make = partial(measured_model, dense.config, dtype=dense.dtype, device=dense.device)
    started = time.perf_counter()
    measured = measure_latencies(structure, make, layers_to_measure(structure, dense.dtype), time_models, {})
    costs, full = measured.costs(structure), [block.groups for block in structure.blocks]
    took = time.perf_counter() - started
    print(f"{phase}, batch {batch}: table in {took:.0f} s, dense {1000 * costs(full):.1f} ms", flush=True)
    for number, speed in enumerate(targets):
        aim = Target(Speed(speed, phase, batch, tokens), costs, costs(full))
        counts_at = partial(counts_of, structure, ATTENTIONS if number % 2 else ())
        counts = counts_at(aim.ratio(counts_at))
        scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
        pruned = prune_model(dense, structure, make_plan(structure, scores, counts))
        times = time_to_report({"dense": dense, "pruned": pruned})
        predicted, reached = aim.shown(costs(counts)), times["dense"] / times["pruned"]
        print(
            f"  target {speed}: {structure.removed_parameters(counts) / structure.total_parameters:.1%} removed,"
            f" predicted {predicted:.3f}, measured {reached:.3f}, error {predicted / reached - 1:+.1%}",
            flush=True,
        )


def counts_of(structure: Structure, without_attention: tuple[int, ...], ratio: float) -> list[int]:
    budget = Budget(ratio, Profile(1, 1), round_to=32, without_attention=without_attention)
    return kept_counts(
        structure, budget if without_attention else reference_budget(PruneConfig(model=""), structure, ratio)
    )


if __name__ == "__main__":
    run_benchmark(main)
