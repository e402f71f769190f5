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
_CONTROL_GROUP = Path("/sys/fs/cgroup")
# Activations of many sizes, freed in another order than they came, leave gaps in the heap of a process, and so do
# matrices that shrink step by step (see docs/benchmarks.md).
_GAPS = {"cpu": 1.3}
_GAPS_OF_SHRINKING = {"cpu": 2.0}


@dataclass(frozen=True)
class Memory:
    """What a stage holds at most, in bytes.

    Attributes:
        device: on the device that the model runs on.
        host: in the memory of the machine beside that; nothing where the device is the CPU.
    """

    device: int
    host: int = 0


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
    run = _Run(config, model, structure, kept_counts(structure, budget), device, dtype, layer_wise)
    stages = {"loading": run.resident}
    if config.compensation != "none" or config.space == "extended":
        stages["reading activations"] = run.reading_activations()
    stages["measuring"] = run.measuring()
    if config.space == "extended":
        stages["comparing removals"] = run.comparing_removals()
    stages["searching"] = run.searching()
    if config.fits_sequentially:
        stages["compensating"] = run.compensating()
    stages["saving"] = run.resident + run.own_parameters * run.weight
    if device.type == "cpu":
        return {stage: Memory(held) for stage, held in stages.items()}
    on_host = {"comparing removals": run.statistics, "searching": run.statistics + run.references}
    if layer_wise:
        cut = run.own_parameters * run.weight
        on_host |= {stage: on_host.get(stage, 0) + cut for stage in ("searching", "compensating", "saving")}
    return {stage: Memory(held - on_host.get(stage, 0), on_host.get(stage, 0)) for stage, held in stages.items()}


class _Run:
    """What a run holds of each kind, and in each stage, in bytes where nothing else is said.

    Attributes:
        counts: how many groups of each block stay.
        weight: of a number as it is stored.
        running: of a number in the dtype that trials and moments run in.
        copied: of a number in the copy in that dtype; 0 where there is none.
        resident: of the weights that are always in memory, with the largest layer where the others are not.
        own_parameters: number of those that a cut model does not share with the dense one.
        largest: entries of the largest matrix of second moments.
        matrix: entries of the largest row-wise projection.
        statistics, references: of what is measured, and of the dense model's predictions.
    """

    def __init__(
        self,
        config: PruneConfig,
        model: PreTrainedModel,
        structure: Structure,
        counts: list[int],
        device: torch.device,
        dtype: torch.dtype,
        layer_wise: bool,
    ) -> None:
        self.config, self.model, self.structure, self.counts = config, model, structure, counts
        self.device, self.dtype, self.layer_wise = device, dtype, layer_wise
        embeddings: Any = model.get_input_embeddings()
        self.vocabulary: int = embeddings.weight.shape[0]
        self.hidden: int = embeddings.weight.shape[1]
        self.weight = dtype.itemsize
        has_copy = dtype == torch.float32 and computes_bfloat16_natively(device) and not layer_wise
        self.running, self.copied = (_BFLOAT, _BFLOAT) if has_copy else (self.weight, 0)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        of_layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(model)]
        always = self.parameters - sum(of_layers) + max(of_layers) if layer_wise else self.parameters
        self.resident = always * self.weight
        # Blocks from which nothing goes are shared; read layer by layer, they come into memory as they are used, which
        # those in front of the first cut are not.
        cut = [block.layer for block, count in zip(structure.blocks, counts, strict=True) if count < block.groups]
        self.own_parameters = sum(
            count * block.parameters_per_group
            for block, count in zip(structure.blocks, counts, strict=True)
            if (block.layer >= min(cut) if layer_wise else count < block.groups)
        )
        self.widths = [block.groups * block.row_wise.width for block in structure.blocks]
        self.largest = max(self.widths) ** 2
        self.matrix = max(
            block.row_wise.elements * width for block, width in zip(structure.blocks, self.widths, strict=True)
        )
        self.statistics = self._statistics()
        # Of every window, in float16, where trials are judged by the divergence from the dense model.
        self.references = self._objective_tokens() * self.vocabulary * 2 if config.selection == "kl" else 0

    def measuring(self) -> int:
        samples = min(MEASURED_AT_ONCE[self.layer_wise], self.config.pool)
        tokens = samples * self.config.seq_len
        of_layer = math.ceil(tokens * saved_activations(self.model.config, self.dtype) * _GAPS.get(self.device.type, 1))
        activations = of_layer * (1 if self.layer_wise else self.structure.layers)
        logits = tokens * self.vocabulary * self.weight + 2 * self.config.seq_len * self.vocabulary * _FLOAT
        return self.resident + activations + logits + 3 * self.matrix * _FLOAT

    def reading_activations(self) -> int:
        of_layers = [0] * self.structure.layers
        for block, width in zip(self.structure.blocks, self.widths, strict=True):
            of_layers[block.layer] += width**2
        sums = 2 * max(of_layers) * _FLOAT
        states = self._compensation_tokens() * self.hidden * self.running
        return self.resident + self._copy() + states + sums + 5 * self.largest * _FLOAT

    def comparing_removals(self) -> int:
        # In float64 the inverse and its factor, or what is left of it at a step and before; and what it is of.
        working = (5 * self.largest + 4 * self.matrix) * _FLOAT * _GAPS_OF_SHRINKING.get(self.device.type, 1)
        return self.resident + int(working) + self.statistics

    def searching(self) -> int:
        per_layer = self.config.layout == "per-layer"
        known_layers = max(MOST_PROTECTED_FIRST, self.config.protect_first or 0) + 1 if per_layer else 0
        prefixes = known_layers * self._objective_tokens() * self.hidden * self.running
        at_once = tokens_per_batch(self.device) * self.running + 2 * self.config.seq_len * _FLOAT
        working = max(self._solving(), at_once * self.vocabulary)
        cut = self.own_parameters * self.running
        return self.resident + self._copy() + cut + working + prefixes + self.statistics + self.references

    def compensating(self) -> int:
        # The hidden states of both models, and what goes into a projection of the cut one, whose copy shares nothing.
        inputs = max(
            count * block.row_wise.width if count < block.groups else 0
            for block, count in zip(self.structure.blocks, self.counts, strict=True)
        )
        seen = self._compensation_tokens() * (2 * self.hidden + inputs) * self.running
        left = self.parameters - removed_parameters(self.structure, self.counts)
        cut = self.own_parameters * self.weight + left * self.copied
        return self.resident + self._copy() + cut + seen + self._solving()

    def _copy(self) -> int:
        return self.parameters * self.copied

    def _solving(self) -> int:
        """Of the damped system of one block."""
        return 4 * self.largest * _FLOAT + 3 * self.matrix * _FLOAT

    def _compensation_tokens(self) -> int:
        return self.config.compensation_windows * self.config.seq_len

    def _objective_tokens(self) -> int:
        return (self.config.objective_windows + self.config.final_windows) * self.config.seq_len

    def _statistics(self) -> int:
        vectors = sum(part.width * block.groups for block in self.structure.blocks for part in block.matrices)
        per_sample = vectors * (3 if self.config.terms == "all" else 1) + 2 * sum(self.widths)
        return self.config.pool * per_sample * _FLOAT


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
    """A model of the same family and widths with few layers; its weights are whatever was in memory."""
    shortened = copy.deepcopy(config)
    shortened.num_hidden_layers = layers
    if getattr(shortened, "layer_types", None):
        shortened.layer_types = (list(shortened.layer_types) * layers)[:layers]
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
    limit, used, parts = (_CONTROL_GROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not all(path.is_file() for path in (limit, used, parts)) or not limit.read_text().strip().isdigit():
        return available
    # Pages of files count as used, and go when there is need of them.
    own = dict(line.split() for line in parts.read_text().splitlines())
    reclaimable = int(own["active_file"]) + int(own["inactive_file"])
    return min(available, int(limit.read_text()) - int(used.read_text()) + reclaimable)
