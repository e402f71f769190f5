"""Which published shapes fit which cards, and for how long a run would compute, as a table: nothing is loaded or run.

    python benchmarks/fits.py

Memory is what `adapruner inspect --cost` prints. Minutes are arithmetic and no measurement. They count multiplications
of the model and of second moments, and what is read from the disk or moved to the card, one after the other: no
removal of whole parts, no evaluation, no program.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from adapruner.config import PruneConfig
from adapruner.memory import GIB, TOKENS_FOR_COSTS, USABLE, Memory, estimate_memory, windows_of
from adapruner.models import batches_together, decoder_layers, empty_model, texts_at_once
from adapruner.option_rules import scoring_bounds, written_count
from adapruner.planning import kept_counts, reference_budget
from adapruner.search import JUDGED_TOGETHER
from adapruner.structure import Structure, build_structure

_llama = partial(LlamaConfig, num_key_value_heads=8, vocab_size=128_256, dtype="bfloat16", max_position_embeddings=8192)
MODELS: dict[str, PreTrainedConfig] = {
    "Llama-3.2-1B": _llama(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, tie_word_embeddings=True
    ),
    "Llama-3-8B": _llama(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32),
    "Qwen3-32B": Qwen3Config(
        hidden_size=5120,
        intermediate_size=25_600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        dtype="bfloat16",
    ),
    "Llama-3-70B": _llama(hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64),
}


@dataclass(frozen=True)
class Machine:
    """A card in a machine, in GiB, and dense bfloat16 and float32 (without TF32) products per second as
    their data sheets say."""

    name: str
    memory: int
    bfloat16: float
    float32: float
    host: int


# Of the extended space, on most models.
_STARTING_POINTS = 12
MACHINES = [
    Machine("24 GB (RTX 4090)", 24, 165e12, 83e12, 128),
    Machine("48 GB (L40S)", 48, 362e12, 92e12, 256),
    Machine("80 GB (H100)", 80, 989e12, 67e12, 512),
]
# Of the products of a data sheet, those that are reached; bytes per second from main memory to a card and from a disk.
REACHED, TO_CARD, FROM_DISK = 0.4, 25e9, 5e9


@dataclass(frozen=True)
class Work:
    """Of a stage: products in bfloat16 and in float32, bytes of weights and of second moments that are moved to the
    card."""

    bfloat16: float
    float32: float = 0.0
    weights: float = 0.0
    moments: float = 0.0


def works(config: PruneConfig, model: PreTrainedModel, structure: Structure, by_layer: bool) -> dict[str, Work]:
    """What every stage computes and moves."""
    counts = kept_counts(structure, reference_budget(config, structure, max(config.ratio)))
    layers = sum(weight.numel() for layer in decoder_layers(model) for weight in layer.parameters())
    embedding = sum(weight.numel() for weight in model.get_input_embeddings().parameters())
    size = sum(weight.numel() for weight in model.parameters()) * 2.0
    streamed = size if by_layer else 0.0
    written = written_count(config.self_windows, config.compensation_windows, can_write=True)
    tokens = config.seq_len * (config.compensation_windows + written)
    blocks = list(zip(structure.blocks, counts, strict=True))
    squares = float(sum(block.inputs**2 for block, _ in blocks))
    cubes = float(sum(block.inputs**3 for block, _ in blocks))
    kept = [(n * block.inputs / block.groups, block.row_wise.elements) for block, n in blocks if n < block.groups]
    solved = sum(n**3 / 3 + 2 * n**2 * outputs for n, outputs in kept)
    of_token = 2.0 * layers
    judged = scoring_bounds(config.objective_windows)[1] * config.seq_len
    at_once = texts_at_once(written, config.seq_len, torch.device("cuda"))
    together = at_once * batches_together(model.config, at_once, config.seq_len, torch.bfloat16)
    # Every change runs half of the layers of the pruned model; two rounds, in each of which heads are tried twice.
    changes = 2 * sum(2 if block.kind == "heads" else 1 for block, _ in blocks)
    probed = windows_of(TOKENS_FOR_COSTS, config.pool, config.seq_len) * config.seq_len
    left = 1 - max(config.ratio)
    # A step of 4 windows; the teacher runs forward once, the pruned model twice and backward.
    steps = tokens / config.seq_len / 4
    trials = config.trials or _STARTING_POINTS
    work = {
        "writing text": Work(
            written * config.seq_len * 2.0 * (layers + embedding),
            weights=config.seq_len * math.ceil(written / together) * streamed,
        ),
        "reading activations": Work(tokens * of_token, tokens * squares, streamed),
        # Three forward passes; layer by layer, each layer runs forward once more.
        "measuring": Work(config.pool * config.seq_len * of_token * (4 if by_layer else 3), 0.0, 2 * streamed),
        # A Cholesky factor, the inverse, and an elimination: 1/3, 2/3 and 2/3 of a cube, each product two operations.
        "comparing removals": Work(0.0, 10 / 3 * cubes, streamed, 4 * squares),
        "searching": Work(
            trials * judged * 2.0 * (layers + embedding),
            trials * solved,
            trials * streamed,
            trials * 4 * squares,
        ),
        "levelling widths": Work(
            changes * probed * (of_token * left / 2 + 2.0 * embedding),
            changes / len(blocks) * solved,
            changes * streamed * left / 2 / JUDGED_TOGETHER,
            changes / len(blocks) * 4 * squares,
        ),
        "compensating": Work(2 * tokens * of_token, tokens * squares + solved, 2 * streamed),
        "tuning scales": Work(tokens * of_token * (1 + 3 * left), weights=steps * streamed * (1 + 2 * left)),
    }
    if not config.levels_widths:
        del work["levelling widths"]
    return work


def minutes(stages: dict[str, Work], machine: Machine, needed: dict[str, Memory]) -> dict[str, float]:
    """By stage and what is done in it."""
    # As a run does: half of what is free beyond the need of the search holds second moments, first on the card.
    search, of_trial = needed["searching"], stages["comparing removals"].moments
    on_card = max(0.0, machine.memory * GIB - search.device) / 2 / of_trial
    in_memory = on_card + max(0.0, machine.host * GIB - search.host) / 2 / of_trial
    spent = {}
    for name, work in stages.items():
        parts = {
            "bfloat16 products": work.bfloat16 / (REACHED * machine.bfloat16),
            "float32 products": work.float32 / (REACHED * machine.float32),
            "weights to the card": work.weights / TO_CARD,
            "second moments to the card": work.moments * max(0.0, 1 - on_card) / TO_CARD,
            "second moments from disk": work.moments * max(0.0, 1 - in_memory) / FROM_DISK,
        }
        for part, seconds in parts.items():
            spent[f"{name}: {part}"] = seconds / 60
    return spent


def fits(needed: dict[str, Memory], machine: Machine, share: float) -> bool:
    return all(
        each.device <= share * machine.memory * GIB and each.host <= share * machine.host * GIB
        for each in needed.values()
    )


def rows() -> Iterator[tuple[str, ...]]:
    """Model, machine, how it fits, the most memory and its stage, minutes and the stage with most of them."""
    config, device = PruneConfig(model="x"), torch.device("cuda")
    for name, shapes in MODELS.items():
        model = empty_model(shapes)
        structure = build_structure(model)
        budget = reference_budget(config, structure, max(config.ratio))
        estimates = {way: estimate_memory(config, model, structure, budget, device, way) for way in (False, True)}
        for machine in MACHINES:
            by_layer = not fits(estimates[False], machine, USABLE)
            needed = estimates[by_layer]
            stage, most = max(needed.items(), key=lambda item: item[1].device)
            host = max(each.host for each in needed.values())
            memory = f"{most.device / GIB:.0f} GiB ({stage}, {most.largest})", f"{host / GIB:.0f} GiB"
            if not fits(needed, machine, 1.0):
                yield name, machine.name, "no", *memory, "", ""
                continue
            stages = works(config, model, structure, by_layer)
            spent = minutes(stages, machine, needed)
            slowest = max(spent, key=spent.__getitem__)
            how = "layer by layer" if by_layer else "in memory"
            total = sum(spent.values())
            yield name, machine.name, how, *memory, "< 1" if total < 1 else f"{total:.0f}", slowest


def main() -> None:
    """Prints the table."""
    table = Table(box=box.MARKDOWN)
    for column in ("model", "machine", "fits", "most on a card", "main memory", "minutes", "most of them"):
        table.add_column(column)
    for row in rows():
        table.add_row(*row)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
