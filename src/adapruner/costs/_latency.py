"""The latency of a pruned model, from latencies of narrower layers measured on this device."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from adapruner.config import Phase
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import seconds_in_turn
from adapruner.files import write_text
from adapruner.models import FILE_FIELDS, describe_device
from adapruner.planning import Costs, make_plan
from adapruner.structure import Kind, Structure, build_structure
from adapruner.surgery import fields_of_layers, prune_model

# Layers of this many bytes exceed the caches of a processor: each weight is read from memory, as in the model.
_BYTES_OF_LAYERS = 2**29
# Number of equal steps from the full width down at which channels and heads are measured.
_STEPS: dict[Kind, int] = {"channels": 8, "heads": 4}
# Tokens generated to measure the time of one.
_NEW_TOKENS = 16

Timer = Callable[[Mapping[str, PreTrainedModel]], Mapping[str, float]]


class Latencies(BaseModel, extra="forbid", frozen=True):
    """The latencies of layers on one device, in one phase, at one batch size.

    Attributes:
        about: device, dtype, threads, model and phase.
        seconds: of the dense model, for a prompt or for one generated token.
        of_layer: seconds of one dense layer.
        added: by kind and number of kept groups, the latency of a layer minus that of the dense layer, in seconds;
            negative if it is faster.
    """

    about: dict[str, Any]
    seconds: float
    of_layer: float
    added: dict[Kind, dict[int, float]]

    def costs(self, structure: Structure) -> Costs:
        """Seconds of a pruned model: linear between the measured widths, a sum over blocks."""
        grids = {kind: (sorted(added), [added[kept] for kept in sorted(added)]) for kind, added in self.added.items()}

        def costs(counts: Any) -> float:
            removed = structure.removed_layers(counts)
            blocks = [
                float(np.interp(count, *grids[block.kind]))
                for block, count in zip(structure.blocks, counts, strict=True)
                if block.layer not in removed
            ]
            return self.seconds - len(removed) * self.of_layer + math.fsum(blocks)

        return costs


def measured_model(config: PreTrainedConfig, layers: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A random model of a config with its first layers: latency does not depend on the values of the weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shorter = type(config).from_dict(fields_of_layers(config, config.to_dict(), range(layers)))
        model: Any = AutoModelForCausalLM.from_config(shorter, dtype=dtype)
    moved: PreTrainedModel = model.to(device).eval()
    return moved


def describe_measuring(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, phase: Phase, batch: int, context: int
) -> dict[str, Any]:
    """Everything that latencies depend on, as JSON."""
    about = {
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype),
        "phase": phase,
        "batch": batch,
        "context": context,
        "model": {name: value for name, value in config.to_dict().items() if name not in FILE_FIELDS},
    }
    as_json: dict[str, Any] = json.loads(json.dumps(about, default=str))
    return as_json


def read_latencies(about: dict[str, Any], measure: Callable[[], Latencies]) -> Latencies:
    """Latencies from the cache of this user, measured if they are not in it.

    Args:
        about: everything that they depend on; see `describe_measuring`.
    """
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    file = Path(constants.HF_HOME) / "adapruner" / "latencies" / f"{about['model']['model_type']}-{key[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        return Latencies.model_validate_json(file.read_bytes())
    measured = measure()
    # Without a writable cache, they are measured every time.
    with contextlib.suppress(OSError, AdaPrunerError):
        write_text(file, measured.model_dump_json(indent=2))
    return measured


def check_latencies(structure: Structure) -> None:
    """Raises AdaPrunerError if one layer does not represent the others, or experts would have to be measured."""
    if structure.cuts_experts:
        raise AdaPrunerError("`target_speed` does not support experts: a token uses the same number as before")
    if structure.layers < 2:
        raise AdaPrunerError("`target_speed` compares layers: this model has only one")
    if structure.whole_mixers or len({(block.kind, block.groups) for block in structure.blocks}) > 2:
        raise AdaPrunerError("`target_speed` measures one layer for all: the layers of this model differ")


def layers_to_measure(structure: Structure, dtype: torch.dtype) -> int:
    """Number of layers of a model that exceeds the caches of any processor; at least 2."""
    size = max(structure.layer_parameters) * dtype.itemsize
    return min(structure.layers, max(2, math.ceil(_BYTES_OF_LAYERS / size)))


def measure_latencies(
    structure: Structure,
    make: Callable[[int], PreTrainedModel],
    layers: int,
    timer: Timer,
    about: dict[str, Any],
    progress: Callable[[int], None] | None = None,
) -> Latencies:
    """Times models in which all layers but the first are narrower in one kind of block, each in turn with the dense
    model, so that other load on the machine affects both.

    Args:
        structure: of the model to prune.
        make: gives a similar model with a number of layers; see `measured_model`.
        layers: number of layers of the timed models, at least 2.
        timer: gives the seconds of models that are timed in turn, by name.
        progress: called with 1 after every timing, `timings` in all.
    """
    model, shorter = make(layers), make(layers // 2)

    def compared(smaller: PreTrainedModel) -> tuple[float, float]:
        """Seconds of the dense model, and those of a smaller one as a fraction of these."""
        times = timer({"dense": model, "other": smaller})
        if progress:
            progress(1)
        return times["dense"], times["other"] / times["dense"]

    sample = build_structure(model, structure.head_granularity)
    dense, relative = compared(shorter)
    measured = {
        kind: {kept: compared(_narrowed(model, sample, kind, kept)) for kept in grid}
        for kind, grid in _grids(structure).items()
    }
    seconds = min([dense, *(dense_again for grid in measured.values() for dense_again, _ in grid.values())])
    of_layer = seconds * (1 - relative) / (layers - layers // 2)
    full = {block.kind: block.groups for block in structure.blocks}
    return Latencies(
        about=about,
        seconds=seconds + (structure.layers - layers) * of_layer,
        of_layer=of_layer,
        added={
            kind: _rising(
                {kept: seconds * (ratio - 1) / (layers - 1) for kept, (_, ratio) in grid.items()} | {full[kind]: 0.0}
            )
            for kind, grid in measured.items()
        },
    )


def _rising(seconds: Mapping[int, float]) -> dict[int, float]:
    """Seconds by width, changed so that they do not fall with the width, and relative to the full width: isotonic
    regression by pooling neighbours (Ayer et al. 1955), with the least sum of squared changes. Neighbours are measured
    one after the other, and a wider layer that seems faster is noise."""
    pools: list[list[float]] = []
    for kept in sorted(seconds):
        pools.append([seconds[kept]])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    means = [statistics.fmean(pool) for pool in pools for _ in pool]
    return {kept: mean - means[-1] for kept, mean in zip(sorted(seconds), means, strict=True)}


def timings(structure: Structure) -> int:
    """Number of timings in `measure_latencies`."""
    return 1 + sum(map(len, _grids(structure).values()))


def _grids(structure: Structure) -> dict[Kind, list[int]]:
    """By kind of block, the numbers of kept groups to measure, without the full one."""
    grids: dict[Kind, list[int]] = {}
    for kind, block in {block.kind: block for block in structure.blocks}.items():
        step = block.strata * math.ceil(block.groups / block.strata / _STEPS[kind])
        grids[kind] = [*([0] if structure.is_removable(block) else []), *range(block.groups - step, 0, -step)]
    return grids


def _narrowed(model: PreTrainedModel, structure: Structure, kind: Kind, kept: int) -> PreTrainedModel:
    counts = [kept if block.kind == kind and block.layer else block.groups for block in structure.blocks]
    return prune_model(model, structure, make_plan(structure, torch.zeros(structure.group_offsets[-1]), counts))


def timer(phase: Phase, batch: int, context: int, is_reported: bool = False) -> Timer:
    """Times models on this machine, with fewer repetitions for many sequences at once, which vary less.

    Args:
        is_reported: True for three times as many repetitions, for a number that is reported.
    """
    new_tokens, repetitions = _NEW_TOKENS if phase == "decode" else 0, 8 if batch == 1 else 5
    repetitions *= 3 if is_reported else 1
    return lambda models: seconds_in_turn(models, batch, context, new_tokens, repetitions)
