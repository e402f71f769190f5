"""Which cut buys which speed: the same share of the parameters, taken as channels or as attention layers.

Makes "Which parts to remove for speed" of research/results.md. Takes about a quarter of an hour.

    python benchmarks/cuts.py

The removed groups are drawn at random, because speed depends on shapes alone. The models take turns.
"""

from __future__ import annotations

import torch
from cyclopts import run

from adapruner.budget.counts import Budget, kept_counts
from adapruner.budget.plan import make_plan
from adapruner.evaluation.speed import measure_speed
from adapruner.model.loading import load_model
from adapruner.model.places import find_model
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from machine import describe

ATTENTION_LAYERS = tuple(range(6, 24, 3))


def main(*, model: str = "smollm2", ratio: float = 0.2, repetitions: int = 5) -> None:
    """Prints the median tokens per second of every model.

    Args:
        ratio: of the parameters.
        repetitions: of every measurement.
    """
    print(describe())
    dense = load_model(find_model(model), "bfloat16")
    structure = build_structure(dense)
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    attention = sum(structure.attention_parameters[layer] for layer in ATTENTION_LAYERS) / structure.total_parameters
    rest = kept_counts(structure, Budget(ratio - attention, round_to=32))
    gone = [block.kind == "heads" and block.layer in ATTENTION_LAYERS for block in structure.blocks]
    counts = {
        "channels, layers differ": kept_counts(structure, Budget(ratio, round_to=32)),
        "channels, all layers equal": kept_counts(structure, Budget(ratio, "uniform", round_to=32)),
        f"{len(ATTENTION_LAYERS)} attention layers, the rest channels": [
            0 if whole else count for whole, count in zip(gone, rest, strict=True)
        ],
    }
    models = {"dense": dense}
    for name, kept in counts.items():
        models[name] = prune_model(dense, structure, make_plan(structure, scores, kept))
    for name, speed in measure_speed(models, repetitions=repetitions).items():
        rates = [("prompt", batch, rate) for batch, rate in speed.prefill.items()]
        rates += [("new", batch, rate) for batch, rate in speed.decode.items()]
        shown = ", ".join(f"{kind} {rate.median:.0f} at batch {batch}" for kind, batch, rate in rates)
        print(f"{name}: {speed.parameters:,} parameters; {shown} tokens per second", flush=True)


if __name__ == "__main__":
    run(main)
