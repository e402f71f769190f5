"""The memory that each stage takes, from shapes alone."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from adapruner.config import PruneConfig
from adapruner.evaluation import tokens_per_batch
from adapruner.models import computes_bfloat16_natively, decoder_layers, enter_layers
from adapruner.planning import Budget, kept_counts, removed_parameters
from adapruner.search import MOST_PROTECTED_FIRST
from adapruner.structure import Structure

# Samples that are measured at once; layer by layer the activations of one layer are kept, and so of more samples.
MEASURED_AT_ONCE = {False: 4, True: 16}
_FLOAT, _BFLOAT = 4, 2
# Activations of many sizes, freed in another order than they came, leave gaps in the heap of a process (see
# docs/benchmarks.md).
_GAPS = {"cpu": 1.3}


@dataclass(frozen=True)
class Memory:
    """What a stage holds at most, in bytes.

    Attributes:
        device: on the device that the model runs on.
        host: in the memory of the machine beside that; nothing where the device is the CPU.
    """

    device: int
    host: int = 0


@dataclass(frozen=True)
class _Sizes:
    """Sizes in bytes.

    Attributes:
        weight: of a number as it is stored.
        running: of a number in the dtype that trials and moments run in.
        resident: of the weights that are always in memory, with the largest layer where the others are not.
        copied: bytes of every parameter in the copy in the dtype that trials run in; 0 where there is none.
    """

    weight: int
    running: int
    resident: int
    copied: int


def estimate_memory(
    config: PruneConfig,
    model: PreTrainedModel,
    structure: Structure,
    budget: Budget,
    device: torch.device,
    dtype: torch.dtype,
    layer_wise: bool,
) -> dict[str, Memory]:
    """The memory of every stage up to the saved model, the program itself left out.

    Args:
        model: on the meta device.
        budget: what is to go; where it is searched, what the search starts from.
        device: where the model will run.
        dtype: of the weights.
    """
    sizes = _sizes(model, dtype, device, layer_wise)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    resident, copied = sizes.resident, sizes.copied * parameters
    tokens = config.seq_len
    embeddings: Any = model.get_input_embeddings()
    vocabulary, hidden = embeddings.weight.shape
    widths = [block.groups * block.row_wise.width for block in structure.blocks]
    of_layer = max(
        sum(width**2 for width, block in zip(widths, structure.blocks, strict=True) if block.layer == layer)
        for layer in range(structure.layers)
    )
    largest = max(widths) ** 2
    matrix = max(block.row_wise.elements * width for block, width in zip(structure.blocks, widths, strict=True))

    samples = min(MEASURED_AT_ONCE[layer_wise], config.pool)
    gaps = _GAPS.get(device.type, 1.0)
    activations = math.ceil(gaps * samples * tokens * saved_activations(model.config, dtype))
    logits = samples * tokens * vocabulary * sizes.weight + 2 * tokens * vocabulary * _FLOAT
    at_once = 1 if layer_wise else structure.layers
    measuring = resident + at_once * activations + logits + 3 * matrix * _FLOAT

    states = config.compensation_windows * tokens * hidden * sizes.running
    sums = 2 * of_layer * _FLOAT
    moments = resident + copied + states + sums + 5 * largest * _FLOAT

    statistics = _statistics(config, structure)
    counts = kept_counts(structure, budget)
    own = _own_parameters(structure, counts, layer_wise)
    solving = 4 * largest * _FLOAT + 3 * matrix * _FLOAT
    windows = config.objective_windows + config.final_windows
    known_layers = max(MOST_PROTECTED_FIRST, config.protect_first or 0) + 1 if config.layout == "per-layer" else 0
    prefixes = known_layers * windows * tokens * hidden * sizes.running
    predictions = tokens_per_batch(device) * vocabulary * sizes.running + 2 * tokens * vocabulary * _FLOAT
    # Of every window, in float16, where trials are judged by the divergence from the dense model.
    references = windows * tokens * vocabulary * 2 if config.selection == "kl" else 0
    searching = resident + copied + own * sizes.running + max(solving, predictions) + prefixes
    # The hidden states of both models, and what goes into a projection of the cut one, whose copy shares nothing.
    inputs = max(
        count * block.row_wise.width if count < block.groups else 0
        for block, count in zip(structure.blocks, counts, strict=True)
    )
    seen = config.compensation_windows * tokens * (2 * hidden + inputs) * sizes.running
    left = parameters - removed_parameters(structure, counts)
    compensating = resident + copied + own * sizes.weight + left * sizes.copied + seen + solving
    # The inverse in float64, what is left of it at a step and before, and the second moments that it is of.
    removal = resident + 9 * largest * _FLOAT + 4 * matrix * _FLOAT

    stages = {"loading": resident}
    if config.compensation != "none" or config.space == "extended":
        stages["reading activations"] = moments
    stages["measuring"] = measuring
    if config.space == "extended":
        stages["comparing removals"] = removal + statistics
    stages["searching"] = searching + statistics + references
    if config.fits_sequentially:
        stages["compensating"] = compensating
    stages["saving"] = resident + own * sizes.weight
    if device.type == "cpu":
        return {stage: Memory(held) for stage, held in stages.items()}
    on_host = {"comparing removals": statistics, "searching": statistics + references}
    if layer_wise:
        cut = own * sizes.weight
        on_host |= {stage: on_host.get(stage, 0) + cut for stage in ("searching", "compensating", "saving")}
    return {stage: Memory(held - on_host.get(stage, 0), on_host.get(stage, 0)) for stage, held in stages.items()}


def saved_activations(config: PreTrainedConfig, dtype: torch.dtype) -> float:
    """Bytes that one layer keeps of every token for its backward pass and the gradients of its weights, seen by running
    one with hardly any tokens."""
    model = shortened_model(config, 1, torch.device("cpu"), dtype).requires_grad_(True)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with torch.no_grad():
        ((state, calls),) = enter_layers(model, [tokens])
    (layer,) = decoder_layers(model)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = calls[0].run(layer, state.requires_grad_())
    # Weights, and masks and positions, which all layers are called with, are there once.
    given = [leaf for leaf in tree_leaves((calls[0].arguments, calls[0].named)) if isinstance(leaf, Tensor)]
    others = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *given)}
    del output
    return sum(size for storage, size in kept.items() if storage not in others) / tokens.numel()


def shortened_model(config: PreTrainedConfig, layers: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same family and widths with very few layers; its weights are whatever was in memory."""
    shortened = copy.deepcopy(config)
    shortened.num_hidden_layers = layers
    if getattr(shortened, "layer_types", None):
        shortened.layer_types = shortened.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shortened, dtype=dtype)
    model.to_empty(device=device)
    short: PreTrainedModel = model.eval().requires_grad_(False)
    return short


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device; in a container, what it leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        return min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def _sizes(model: PreTrainedModel, dtype: torch.dtype, device: torch.device, layer_wise: bool) -> _Sizes:
    size = dtype.itemsize
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(model)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    outside = parameters - sum(layers)
    faster = dtype == torch.float32 and computes_bfloat16_natively(device) and not layer_wise
    return _Sizes(
        weight=size,
        running=_BFLOAT if faster else size,
        resident=(outside + max(layers)) * size if layer_wise else parameters * size,
        copied=_BFLOAT if faster else 0,
    )


def _statistics(config: PruneConfig, structure: Structure) -> int:
    vectors = sum(part.width * block.groups for block in structure.blocks for part in block.matrices)
    inputs = sum(block.groups * block.row_wise.width for block in structure.blocks)
    per_sample = vectors * (3 if config.terms == "all" else 1) + 2 * inputs
    return config.pool * per_sample * _FLOAT


def _own_parameters(structure: Structure, counts: list[int], layer_wise: bool) -> int:
    """Parameters of the blocks of a cut model that it does not share with the dense one, as it does those from which
    nothing goes; read layer by layer, all of its blocks come into memory as they are used."""
    return sum(
        count * block.parameters_per_group
        for block, count in zip(structure.blocks, counts, strict=True)
        if layer_wise or count < block.groups
    )
