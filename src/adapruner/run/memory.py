"""The memory that a run needs, computed from shapes, and the devices of the layers of a model accordingly."""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapruner.base.errors import AdaPrunerError
from adapruner.base.processes import this_process
from adapruner.budget.counts import Budget, kept_counts
from adapruner.checkpoint import SHARD_SIZE
from adapruner.copying import are_copyable, copied_bytes, fields_without_experts
from adapruner.importance import needs_moments
from adapruner.measurement.taylor import MEASURED_AT_ONCE, saved_activations
from adapruner.model.architecture import architecture_of, is_pruned
from adapruner.model.generation import batches_together, texts_at_once
from adapruner.model.layers import decoder_layers
from adapruner.model.loading import holds_codes, trial_dtype
from adapruner.model.places import ModelLocation
from adapruner.options import Dtype, PruneConfig, RecoveryOptions, TrainedWeights, allocates_by_cost, size_in_bytes
from adapruner.search.judging import TOKENS_FOR_COSTS
from adapruner.structure.blocks import Structure
from adapruner.text.blends import parse_blend
from adapruner.train.healing import TOKENS_FOR_ALL_WEIGHTS, healing_options, length_of_windows
from adapruner.train.loss import DRAWN_TOKENS, PREDICTIONS_AT_ONCE

GIB = 2**30
# All layers are held in memory if that leaves a quarter of the memory of the machine free.
USABLE = 0.75
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_CPU, _FLOAT32 = torch.device("cpu"), 4


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs: `weights` of all models that are held at once, and the largest `term` of other tensors,
    on each device of the model; and on a `host` whose main memory is not that device. `largest` is the name of the
    term: the option that lowers it, if there is one."""

    weights: int
    term: int
    largest: str
    host: int = 0

    @property
    def device(self) -> int:
        return self.weights + self.term

    @property
    def arithmetic(self) -> str:
        """The sum for a device, in words."""
        term = self.largest if " " in self.largest else f"`{self.largest}`"
        sizes = [f"{size / GIB:.3g} GiB" for size in (self.weights, self.term, self.device)]
        return f"{sizes[0]} of weights + {sizes[1]} of {term} = {sizes[2]}"


@dataclass(frozen=True)
class Placement:
    """The devices over which the layers of a model are spread; with `layer_wise`, the device that holds one layer at a
    time. `memory` is what a run needs there, if that was estimated."""

    devices: tuple[torch.device, ...]
    layer_wise: bool
    memory: Memory | None = field(default=None, compare=False)

    @property
    def device(self) -> str:
        """The devices as the option `device` names them."""
        return ",".join(map(str, self.devices))


def estimate_memory(
    config: PruneConfig,
    model: PreTrainedModel,
    structure: Structure,
    budget: Budget,
    devices: Sequence[torch.device],
    by_layer: bool,
    stated: int | None = None,
    location: ModelLocation | None = None,
) -> Memory:
    """The weights and the largest other term of a run, without the program itself (half a GiB).

    Args:
        model: on the meta device.
        budget: the final budget, or the one that the search starts from.
        devices: over which the layers are spread.
        by_layer: one layer at a time is in memory.
        stated: see `choose_placement`.
        location: of the files, out of which kept experts may be copied; by default they are not.
    """
    if is_pruned(model.config):
        raise AdaPrunerError("the memory needed to prune a model whose layers differ already cannot be estimated")
    on_host, dtype = devices[0].type == "cpu", dtype_of_weights(model, config.dtype)
    trial, size, layers = trial_dtype(dtype, devices[0]), dtype.itemsize, list(map(_count, decoder_layers(model)))
    total, counts = _count(model), kept_counts(structure, budget)
    left, outside = total - structure.removed_parameters(counts), total - sum(layers)

    def held(weights: int) -> int:
        """Those of a model on a device. Of several, the first has what is outside of layers, and none has more than a
        layer beyond its share."""
        share = outside if by_layer else max(weights // len(devices), outside)
        return share + max(layers) * (by_layer or len(devices) > 1)

    dense = held(total) * (size + trial.itemsize * (trial != dtype))  # with its copy for trials
    pruned = held(left) * size
    # With its bytes; of experts that are written one by one, with a copy too.
    copies = 2 + structure.has_experts
    saving = copies * min(left * size, size_in_bytes(SHARD_SIZE)) + max(layers) * size * by_layer
    is_left = location is not None and keeps_codes(config, location, model, structure, counts)

    # Tensors beside the weights, by the option that lowers them: until the search, and from then on.
    length, blocks, (vocabulary, hidden) = config.seq_len, structure.blocks, _embedding_shape(model)
    shares = [count / block.groups for count, block in zip(counts, blocks, strict=True)]
    # Of its inputs, the largest that a pruned block keeps: nearly all, where costs decide.
    chosen = config.space, config.layout, config.ratio_of, config.head_share
    share = 1.0 if allocates_by_cost(*chosen) else max((share for share in shares if share < 1), default=0.0)
    is_written = any(part.is_written for part in parse_blend(config.calibration, missing_ok=True))
    is_searched = config.default_trials > 0
    pool = config.pool * is_searched
    written = max(pool, config.compensation_windows) * is_written
    has_moments = needs_moments(config.compensation, config.space)
    texts = texts_at_once(max(1, written), length, devices[0])
    if by_layer:
        texts *= batches_together(model.config, texts, length, trial)
    cached = min(texts, written) * length * architecture_of(model.config).cached(model.config) // len(devices)
    states = config.compensation_windows * length * trial.itemsize  # a number for every token
    judged = config.objective_windows * length * trial.itemsize
    candidate = 2 * by_layer * is_searched
    compared = bytes_of_predictions(TOKENS_FOR_COSTS // 4, vocabulary)
    moments = max(block.inputs * block.inputs_of_one for block in blocks) * _FLOAT32
    projected = [block.row_wise.elements * block.inputs for block in blocks if block.is_projected]
    projection = max(projected, default=0) * _FLOAT32
    vectors = sum(matrix.width * block.groups for block in blocks for matrix in block.matrices)
    statistics = 3 * vectors + 2 * sum(block.inputs for block in blocks)
    of_pool = pool * statistics * _FLOAT32
    measuring = {
        "seq_len": _activations(model, dtype, min(MEASURED_AT_ONCE[by_layer], pool) * length, by_layer),
        "written text": cached * trial.itemsize,
        "compensation_windows": states * hidden * has_moments,
        # Twice the size in float32: some blocks need float64.
        "second moments": (8 * moments + 4 * projection) * has_moments,
        "pool": of_pool * on_host,
        "text of costs": TOKENS_FOR_COSTS * len(layers) * hidden * trial.itemsize + compared,
    }
    pruning = {
        "objective_windows": candidate * judged * hidden,
        # Of kept with kept inputs, these scaled, their factor, and of kept with removed inputs.
        "second moments": int((1 + share + 2 * share**2) * moments + 3 * share * projection) * has_moments,
        "pool": of_pool * on_host,
    }
    # The same without healing and after it, when the model that is saved was read again.
    phases = [
        (dense, measuring),
        (dense + pruned, pruning),
        (dense + pruned, {"files that are saved": saving * on_host}),
    ]
    healing = healing_within(config, model, left, devices, by_layer, stated)
    if healing and not is_left:
        computed = torch.float32 if healing.train == "ia3" and not by_layer else trial  # see `frozen`
        training = {"training after the cut": _training(model, healing, computed, left, by_layer)}
        phases.append((dense + held(left) * size, training))
    sizes = [(weights, term, name) for weights, terms in phases for name, term in terms.items()]
    return Memory(*max(sizes, key=lambda entry: entry[0] + entry[1]), host=0 if on_host else max(saving, of_pool))


def keeps_codes(
    config: PruneConfig, location: ModelLocation, model: PreTrainedModel, structure: Structure, counts: Sequence[int]
) -> bool:
    """True if a model in FP8 or MXFP4, whose blocks keep so many groups, is copied out of its files and left so: whole
    experts alone are removed, and weights keep their dtype and their tokens. Training would write all weights in 16
    bits, and is done on request alone."""
    is_asked = config.heal != "none" and "heal" in config.given
    as_stored = dtype_of_weights(model, config.dtype) == dtype_of_weights(model, "auto") and not config.vocabulary
    if is_asked or not as_stored or not holds_codes(location):
        return False
    return fields_without_experts(structure, counts) is not None and are_copyable(location, model.config)


def bytes_in_files(
    config: PruneConfig, location: ModelLocation, model: PreTrainedModel, structure: Structure, counts: Sequence[int]
) -> tuple[int, int]:
    """Bytes of the weights of a model, and of the pruned one whose blocks keep so many groups, in files: of numbers, as
    many as there are; of codes that are kept, tensor by tensor."""
    is_kept = keeps_codes(config, location, model, structure, counts)
    if is_kept and (sizes := copied_bytes(location, model.config, structure, counts)):
        return sizes
    size, total = dtype_of_weights(model, config.dtype).itemsize, structure.total_parameters
    return size * total, size * (total - structure.removed_parameters(counts))


def _activations(model: PreTrainedModel, dtype: torch.dtype, tokens: int, of_one_layer: bool) -> int:
    """Bytes that are kept for a backward pass through all layers, or through one and the states between them; and of
    the logits with their losses, in float32."""
    layers, (vocabulary, hidden) = len(decoder_layers(model)), _embedding_shape(model)
    saved = saved_activations(model.config, dtype)
    kept = saved + layers * hidden * dtype.itemsize if of_one_layer else layers * saved
    return int(tokens * kept) + bytes_of_predictions(tokens, vocabulary)


def healing_within(
    config: PruneConfig,
    model: PreTrainedModel,
    weights: int,
    devices: Sequence[torch.device],
    by_layer: bool,
    stated: int | None = None,
) -> RecoveryOptions | None:
    """The options of the training after the cut: with few tokens, of a scale for each input of a linear layer; with
    many, of all weights of the layers if the memory of the machine, free or not, holds that, else of LoRA, else of
    scales, as where layers are streamed or spread over devices; None without a training.

    Args:
        model: on the meta device.
        weights: of the pruned model.
        devices, by_layer, stated: see `estimate_memory`.
    """
    if not (tokens := 0 if config.heal == "none" else int(config.heal)):
        return None
    is_here = devices[0].type == "cpu" or torch.get_device_module(devices[0]).is_available()
    # Of a device that is not here, without a limit.
    total = stated or (total_and_free(devices[0])[0] if is_here else sys.maxsize)
    dtype = dtype_of_weights(model, config.dtype)
    kinds: tuple[TrainedWeights, ...] = ("layers", "lora", "ia3")
    if by_layer or len(devices) > 1 or tokens < TOKENS_FOR_ALL_WEIGHTS:
        kinds = ("ia3",)
    positions = getattr(model.config, "max_position_embeddings", None)
    length = length_of_windows(config.seq_len, config.compensation_windows, positions)
    for trained in kinds:
        options = healing_options(trained, tokens, length, config.seed, devices[0], by_layer)
        models = _count(model) * trial_dtype(dtype, devices[0]).itemsize + weights * dtype.itemsize
        if models + _training(model, options, dtype, weights, by_layer) <= USABLE * total:
            return options
    return options


def _training(
    model: PreTrainedModel, options: RecoveryOptions, dtype: torch.dtype, weights: int, by_layer: bool
) -> int:
    """Bytes of a training beside the weights: what is trained and its gradients in float32, the two moments of the
    optimizer, and the activations.

    Args:
        weights: of the pruned model.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    of_adapters = {"lora": options.lora_rank * sum(sum(module.weight.shape) for module in linear)}
    of_adapters["ia3"] = sum(module.weight.shape[-1] for module in linear)
    trained = of_adapters.get(options.train, weights)
    moments = 2 * (1 if "8bit" in options.optimizer else _FLOAT32)
    tokens, checkpoints = options.micro_batch_size * options.seq_len, options.gradient_checkpointing or by_layer
    # Of both heads, the rows of a text's tokens, hardly more than are drawn, and of these.
    rows, width = _embedding_shape(model)
    gathered = 2 * min(rows, 2 * DRAWN_TOKENS) * width * dtype.itemsize
    return trained * (2 * _FLOAT32 + moments) + gathered + _activations(model, dtype, tokens, checkpoints)


def bytes_of_predictions(tokens: int, vocabulary: int) -> int:
    """Memory while the losses of training are computed, of a part of the tokens at a time, in five tensors."""
    return min(PREDICTIONS_AT_ONCE, tokens) * vocabulary * _FLOAT32 * 5


def dtype_of_weights(model: PreTrainedModel, dtype: Dtype) -> torch.dtype:
    """The dtype that a model is loaded in: `auto` is the dtype of the checkpoint."""
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    return cast(torch.dtype, model.config.dtype or torch.float32)


def _embedding_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Tokens and hidden size."""
    rows, width = cast(nn.Embedding, model.get_input_embeddings()).weight.shape
    return rows, width


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def choose_placement(
    config: PruneConfig,
    model: PreTrainedModel,
    structure: Structure,
    budget: Budget,
    devices: Sequence[torch.device],
    streamable: bool,
    stated: int | None = None,
    location: ModelLocation | None = None,
) -> Placement:
    """The devices of the layers of a model. By default, these are as few devices as hold all layers; if all devices
    together are too small and the layers are `streamable` (can be read one by one), one layer is held at a time. The
    free memory decides only whether the run is refused.

    Args:
        devices: the devices that may be used; all of them are used if the options name them.
        stated: bytes of memory of each device, for GPUs that are not here. Main memory is not checked then.
        location: see `estimate_memory`.
    """
    by_layer = config.layer_wise
    least = 1 if config.device == "auto" or by_layer else len(devices)
    if is_pruned(model.config):
        return Placement(tuple(devices[:least]), bool(by_layer))
    if stated is None:
        (host_total, host_free), memories = total_and_free(_CPU), [total_and_free(device) for device in devices]
    else:
        host_total, host_free, memories = sys.maxsize, sys.maxsize, [(stated, stated)] * len(devices)

    def fits(count: int) -> bool:
        needed = estimate_memory(config, model, structure, budget, devices[:count], False, stated)
        total = min(total for total, _ in memories[:count])
        return needed.device <= USABLE * total and needed.host <= USABLE * host_total

    count = 1 if by_layer else next(filter(fits, range(least, len(devices) + 1)), None)
    if by_layer is None:
        by_layer = streamable and count is None
    used = tuple(devices[: count or (1 if by_layer else len(devices))])
    needed = estimate_memory(config, model, structure, budget, used, by_layer, stated, location)
    free = min(free for _, free in memories[: len(used)])
    if (needed.device > free or needed.host > host_free) and not config.ignore_memory:
        ways = [f"a smaller `{needed.largest}`"] * (" " not in needed.largest)
        ways += ["`layer_wise`"] * (streamable and not by_layer)
        ways += ["`dtype` bfloat16"] * (dtype_of_weights(model, config.dtype).itemsize > 2)
        problem = f"{needed.host / GIB:.3g} GiB are needed in main memory, {host_free / GIB:.3g} are free"
        if needed.device > free:
            places = ", ".join(map(str, used))
            problem = f"{needed.arithmetic} are needed on {places}, {free / GIB:.3g} are free"
        raise AdaPrunerError(
            f"Not enough memory: {problem}. Try {' or '.join(ways or ['a smaller model'])}; `ignore_memory` starts the"
            " run all the same"
        )
    return Placement(used, by_layer, needed)


def place_weights(
    models: Sequence[PreTrainedModel], dtype: Dtype, devices: Sequence[torch.device], least: int, may_stream: bool
) -> Placement:
    """The devices of the layers of models that are only run: as few as leave a quarter of their memory free. If all
    devices together are too small, one layer is held at a time if layers `may_stream`, else all devices are used.

    Args:
        models: on the meta device, held together.
        least: minimum number of devices.
    """
    weights = sum(_count(model) * dtype_of_weights(model, dtype).itemsize for model in models)
    for count in range(least, len(devices) + 1):
        if weights / count <= USABLE * min(total_and_free(device)[0] for device in devices[:count]):
            return Placement(tuple(devices[:count]), False)
    return Placement(tuple(devices[: 1 if may_stream else None]), may_stream)


def room_for_moments(device: torch.device, needed: Memory) -> dict[torch.device, int]:
    """Bytes that second moments may occupy beside a run, on the device of the model and then in main memory: half of
    what is free beyond the estimate, which omits them, because a run works without."""
    needs = {_CPU: needed.host} | {device: needed.device}
    return {place: max(0, total_and_free(place)[1] - needs[place]) // 2 for place in dict.fromkeys((device, _CPU))}


def total_and_free(device: torch.device) -> tuple[int, int]:
    """Total and free bytes of memory that this process may use. The limits of a container and of the process count."""
    if device.type != "cpu":
        free, total = torch.get_device_module(device).mem_get_info(device)
        return total, free
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit
        limit, used = (int((_CONTROL_GROUP / f"memory.{name}").read_text("utf-8")) for name in ("max", "current"))
        parts = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text("utf-8").splitlines())
        # Cached pages of files count as used, and are dropped when memory is needed.
        cached = int(parts["active_file"]) + int(parts["inactive_file"])
        total, free = min(total, limit), min(free, limit - used + cached)
    total, free = total // this_process().count_here, free // this_process().count_here
    if sys.platform == "linux":
        process = psutil.Process()
        memory_info = process.memory_info()
        for kind, used in ((psutil.RLIMIT_AS, memory_info.vms), (psutil.RLIMIT_DATA, memory_info.data)):
            limit, _ = process.rlimit(kind)
            if limit != psutil.RLIM_INFINITY:
                total, free = min(total, limit), min(free, limit - used)
    return total, free
