"""The memory that a pruning run needs, from shapes: the weights, and what every stage holds beside them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from adapruner.config import Dtype, PruneConfig
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import tokens_per_batch
from adapruner.measurement import saved_activations
from adapruner.models import architecture_of, decoder_layers, is_pruned, trial_dtype
from adapruner.planning import Budget, kept_counts
from adapruner.processes import this_process
from adapruner.recovery import scale_options
from adapruner.search import JUDGED_TOGETHER, MOST_PROTECTED_FIRST
from adapruner.structure import Structure

GIB = 2**30
# Samples measured at once. Layer-wise, the activations of one layer are kept, so more samples fit.
MEASURED_AT_ONCE = {False: 4, True: 16}
# Of the calibration pool, on which parts are removed whole, and on which the costs of widths are measured: hidden
# states of all layers are kept for them. On fewer, attentions are removed that other text needs (docs/experiments.md).
TOKENS_FOR_WHOLE, TOKENS_FOR_COSTS, _FEWEST_WINDOWS = 4096, 8192, 8
# Windows whose layer is fitted at once.
_FITTED_AT_ONCE = 8
# All layers are held in memory where that leaves a quarter of the machine's memory to everything else.
USABLE = 0.75
_FLOAT32 = 4
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Memory:
    """Bytes that a stage needs on the device of the model, of several on each, and, beside a GPU, in main memory; and
    the largest term by the name of the option that lowers it, where one does."""

    device: int
    host: int
    largest: str


def estimate_memory(
    config: PruneConfig,
    model: Any,
    structure: Structure,
    budget: Budget,
    device: torch.device,
    layer_wise: bool,
    devices: int = 1,
) -> dict[str, Memory]:
    """The memory of every stage up to the saved model, without the program itself (half a GiB).

    `model` is on the meta device; `budget` is what is removed, or what the search starts from; the layers are spread
    over so many `devices`.

    Raises:
        AdaPrunerError: the layers of the model already differ.
    """
    if is_pruned(model.config):
        raise AdaPrunerError("the memory needed to prune a model whose layers differ already cannot be estimated")
    on_host = {"pool", "dense predictions"} | ({"pruned weights"} if layer_wise else set())
    memory = {}
    counts = kept_counts(structure, budget)
    for stage, terms in _stages(config, model, structure, counts, device, layer_wise, devices).items():
        host = sum(size for term, size in terms.items() if term in on_host and device.type != "cpu")
        memory[stage] = Memory(sum(terms.values()) - host, host, max(terms, key=terms.__getitem__))
    return memory


def _stages(
    config: PruneConfig,
    model: Any,
    structure: Structure,
    counts: list[int],
    device: torch.device,
    by_layer: bool,
    devices: int,
) -> dict[str, dict[str, int]]:
    """Bytes by stage and term; a term is named after the option that lowers it, where there is one.

    Args:
        counts: how many groups each block keeps, in the order of `structure.blocks`.
        devices: over how many the weights are spread; everything else is counted on each of them.
    """
    dtype = dtype_of_weights(model, config.dtype)
    trial = trial_dtype(dtype, device)
    with_copy = dtype.itemsize + (trial.itemsize if trial != dtype else 0)
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    of_layers = [sum(weight.numel() for weight in layer.parameters()) for layer in decoder_layers(model)]
    held = sum(weight.numel() for weight in model.parameters()) - (sum(of_layers) - max(of_layers) if by_layer else 0)
    blocks = list(zip(structure.blocks, counts, strict=True))
    # Layer by layer, nothing is shared with the dense model.
    pruned = sum(n * block.parameters_per_group for block, n in blocks if by_layer or n < block.groups)
    if devices > 1:
        # The first holds what is in no layer, and none holds more than a layer beyond its share.
        held = max(held // devices, held - sum(of_layers)) + max(of_layers)
        pruned = pruned // devices + max(of_layers)
    widths = [block.inputs for block, _ in blocks]
    moments_of = Counter[int]()
    for block, _ in blocks:
        moments_of[block.layer] += block.inputs * block.inputs_of_one * _FLOAT32
    moments = max(block.inputs * block.inputs_of_one for block, _ in blocks) * _FLOAT32
    projected = [block for block, _ in blocks if block.is_projected]
    matrix = max((block.row_wise.elements * block.inputs for block in projected), default=0) * _FLOAT32
    largest = (
        max(part.elements * block.groups * part.width for block, _ in blocks for part in block.matrices) * _FLOAT32
    )
    vectors = sum(part.width * block.groups for block, _ in blocks for part in block.matrices)
    measured = min(MEASURED_AT_ONCE[by_layer], config.pool) * config.seq_len
    kept = saved_activations(model.config, dtype) * (1 if by_layer else structure.layers) + vocabulary * dtype.itemsize
    losses = 2 * config.seq_len * vocabulary * _FLOAT32
    objective = (config.scoring_windows[1] + config.final_windows) * config.seq_len
    known = max(MOST_PROTECTED_FIRST, config.protect_first or 0) + 1 if config.layout == "per-layer" else 0
    written = config.self_windows or 0
    if config.self_windows is None and not by_layer:
        written = config.compensation_windows // 2
    text = (config.compensation_windows + written) * config.seq_len * trial.itemsize
    # Layer by layer, the layer in memory is in one dtype, and what is in no layer in both.
    of_layer = max(of_layers) if by_layer else 0
    weights, both = (
        {"weights": held * dtype.itemsize},
        {"weights": (held - of_layer) * with_copy + of_layer * trial.itemsize},
    )
    pool = {"pool": config.pool * (vectors * (3 if config.terms == "all" else 1) + 2 * sum(widths)) * _FLOAT32}
    solving = {"second moments": 4 * moments + 3 * matrix}
    stages = {"loading": {"weights": (held - of_layer) * dtype.itemsize}}
    if config.compensation != "none" or config.space == "extended":
        stages["reading activations"] = both | {
            "compensation_windows": text * hidden,
            # Two sums for every block of a layer; of one block, both means, and two of what they are merged into.
            "second moments": 2 * max(moments_of.values()) + 4 * moments,
        }
    # Layer by layer, the states before and behind a layer and the gradient are held beside what it keeps.
    going_back = 3 * (max(widths) + by_layer * hidden) * dtype.itemsize
    stages["measuring"] = weights | {
        "seq_len": int(measured * (kept + going_back)) + losses,
        "gradients": 3 * (largest if structure.cuts_experts else matrix),
        "sums": min(MEASURED_AT_ONCE[by_layer], config.pool) * (3 * vectors + 2 * sum(widths)) * _FLOAT32,
    }
    if config.space == "extended":
        # Twice as much as float32 takes: some blocks need float64.
        stages["comparing removals"] = weights | pool | {"second moments": 8 * moments + 4 * matrix}
    # Of a batch, what a layer computes, and after the last one the logits.
    widest = max(vocabulary, 3 * max(widths) + 4 * hidden) * trial.itemsize
    at_once = tokens_per_batch(device)
    of_token = (structure.layers + 1) * hidden * trial.itemsize
    if config.space == "extended" and config.search == "joint" and config.whole != ("none",):
        tokens = windows_of(TOKENS_FOR_WHOLE, config) * config.seq_len
        stages["removing parts whole"] = both | {
            "seq_len": tokens * of_token,
            "logits": min(at_once, tokens) * widest + losses,
        }
    stages["searching"] = {
        **(both | pool | solving),
        # Layer by layer, trials have one layer in memory, and the hidden states of all windows.
        ("a pruned layer" if by_layer else "pruned weights"): (max(of_layers) if by_layer else pruned) * trial.itemsize,
        "logits": min(at_once, objective) * widest + losses,
        "objective_windows": (known + by_layer * 2 * JUDGED_TOGETHER) * objective * hidden * trial.itemsize,
        "dense predictions": 2 * objective * vocabulary * (config.selection == "kl"),
    }
    if config.levels_widths and not by_layer:
        tokens = windows_of(TOKENS_FOR_COSTS, config) * config.seq_len
        stages["levelling widths"] = {
            **(both | pool | solving),
            "pruned weights": pruned * trial.itemsize + largest,
            "logits": min(at_once, tokens) * widest + losses,
            "level_rounds": tokens * of_token,
            "dense predictions": 2 * tokens * vocabulary,
        }
    if config.fits_sequentially and architecture_of(model.config).has_plain_residual(model.config):
        # Only what loses something is fitted, in the inputs that it keeps.
        kept_share = max((n / block.groups for block, n in blocks if n < block.groups), default=0.0)
        stages["compensating"] = {
            **both,
            "second moments": int(4 * moments * kept_share**2 + 3 * matrix * kept_share),
            "compensation_windows": text * (2 * hidden + max(widths)),
            "pruned weights": pruned * with_copy,
            # Of a batch: what the layer computes, and what up to three runs of it have left.
            "seq_len": _FITTED_AT_ONCE * config.seq_len * 6 * (hidden + max(widths)) * trial.itemsize,
        }
    if config.tunes_scales and not by_layer and devices == 1:
        removed = sum((block.groups - n) * block.parameters_per_group for block, n in blocks)
        options = scale_options(config.seed, device)
        tokens = options.micro_batch_size * config.seq_len
        # Scales are multiplied in float32.
        saved = saved_activations(model.config, torch.float32)
        checkpointed = saved + (structure.layers + 1) * hidden * trial.itemsize
        activations = checkpointed if options.gradient_checkpointing else structure.layers * saved
        stages["tuning scales"] = both | {
            "pruned weights": (held - removed) * with_copy,
            "seq_len": int(tokens * activations),
            "logits": 3 * tokens * vocabulary * trial.itemsize + 2 * losses,
        }
    return stages


def dtype_of_weights(model: Any, dtype: Dtype) -> torch.dtype:
    """What a model is loaded in: `auto` is the dtype of the checkpoint."""
    found: torch.dtype = model.config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    return found


def windows_of(tokens: int, config: PruneConfig) -> int:
    """How many windows of the pool have about so many tokens."""
    return min(config.pool, max(_FEWEST_WINDOWS, tokens // config.seq_len))


@dataclass(frozen=True)
class Placement:
    """The devices over which the layers of a model are spread; or with `layer_wise`, the one on which one layer at a
    time is."""

    devices: tuple[torch.device, ...]
    layer_wise: bool

    @property
    def device(self) -> str:
        """As `device` of the options names them."""
        return ",".join(map(str, self.devices))


def choose_placement(
    config: PruneConfig,
    model: Any,
    structure: Structure,
    budget: Budget,
    devices: Sequence[torch.device],
    streamable: bool,
) -> Placement:
    """Where the layers of a model are: as the options say, else on as few devices as hold all of them, and one at a
    time where all devices are too small and the layers are `streamable`, so that they can be read one by one. How much
    memory is free decides only whether the run is refused.

    Args:
        devices: those that may be used; all of them are, if the options name them.

    Raises:
        AdaPrunerError: a stage needs more memory than is free, and `ignore_memory` is not set.
    """
    by_layer, dtype = config.layer_wise, dtype_of_weights(model, config.dtype)
    least = 1 if config.device == "auto" or by_layer else len(devices)
    if is_pruned(model.config):
        return Placement(tuple(devices[:least]), bool(by_layer))
    (host_total, host_free), memories = _total_and_free(_CPU), [_total_and_free(device) for device in devices]

    def fits(count: int) -> bool:
        whole = estimate_memory(config, model, structure, budget, devices[0], False, count).values()
        total = min(total for total, _ in memories[:count])
        return all(each.device <= USABLE * total and each.host <= USABLE * host_total for each in whole)

    count = 1 if by_layer else next(filter(fits, range(least, len(devices) + 1)), None)
    if by_layer is None:
        by_layer = streamable and count is None
    used = tuple(devices[: count or (1 if by_layer else len(devices))])
    free = min(free for _, free in memories[: len(used)])
    for stage, each in estimate_memory(config, model, structure, budget, used[0], by_layer, len(used)).items():
        for needed, left, place in ((each.device, free, ", ".join(map(str, used))), (each.host, host_free, _CPU)):
            if needed > left and not config.ignore_memory:
                value = getattr(config, each.largest, None)
                option = f"`{each.largest}`" if value is None else f"`{each.largest}` {value}"
                term = f"{option}; lower it, or" if hasattr(config, each.largest) else f"the {each.largest}:"
                ways = ["`layer_wise`"] * (streamable and not by_layer) + ["`dtype` bfloat16"] * (dtype.itemsize > 2)
                raise AdaPrunerError(
                    f"Not enough memory: {stage} needs about {needed / GIB:.3g} GiB, {left / GIB:.3g} GiB are free on"
                    f" {place}. The largest term is {term} try {' or '.join(ways or ['a smaller model'])};"
                    " `ignore_memory` starts the run all the same"
                )
    return Placement(used, by_layer)


def place_weights(model: Any, dtype: Dtype, devices: Sequence[torch.device], least: int, may_stream: bool) -> Placement:
    """Where the layers of a model are that is only run: on as few devices as leave a quarter of their memory free.
    Where all devices are too small, one at a time if they `may_stream`, else on all devices.

    Args:
        model: on the meta device.
        least: how many devices are used at least.
    """
    weights = sum(weight.numel() for weight in model.parameters()) * dtype_of_weights(model, dtype).itemsize
    for count in range(least, len(devices) + 1):
        if weights / count <= USABLE * min(_total_and_free(device)[0] for device in devices[:count]):
            return Placement(tuple(devices[:count]), False)
    return Placement(tuple(devices[: 1 if may_stream else None]), may_stream)


def room_for_moments(device: torch.device, needed: Memory) -> dict[torch.device, int]:
    """Bytes that second moments may take while a stage uses them, on the device of the model and then in main memory:
    half of what is free beyond what a stage needs in all. The estimates leave them out, because a run works without.

    Args:
        needed: by the stage, as estimated.
    """
    needs = {_CPU: needed.host} | {device: needed.device}
    return {place: max(0, _total_and_free(place)[1] - needs[place]) // 2 for place in dict.fromkeys((device, _CPU))}


def _total_and_free(device: torch.device) -> tuple[int, int]:
    """Bytes of memory that this process may use: in all, and at the moment. A container's limit counts."""
    if device.type != "cpu":
        free, total = torch.get_device_module(device).mem_get_info(device)
        return total, free
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    with contextlib.suppress(OSError, ValueError):  # no container, or none with a limit
        limit, used = (int((_CONTROL_GROUP / f"memory.{name}").read_text("utf-8")) for name in ("max", "current"))
        parts = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text("utf-8").splitlines())
        # Cached pages of files count as used, and are dropped when memory is needed.
        cached = int(parts["active_file"]) + int(parts["inactive_file"])
        total, free = min(total, limit), min(free, limit - used + cached)
    return total // this_process().count_here, free // this_process().count_here
