"""The devices of the layers of a model, chosen by the available memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from adapruner.config import Dtype, PruneConfig
from adapruner.errors import AdaPrunerError
from adapruner.memory._stages import Memory, dtype_of_weights, estimate_memory
from adapruner.models import is_pruned
from adapruner.planning import Budget
from adapruner.processes import this_process
from adapruner.structure import Structure

GIB = 2**30
# All layers are held in memory if that leaves a quarter of the memory of the machine free.
USABLE = 0.75
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """The devices over which the layers of a model are spread; with `layer_wise`, the device that holds one layer at a
    time."""

    devices: tuple[torch.device, ...]
    layer_wise: bool

    @property
    def on_one_device(self) -> bool:
        """True if one device holds all layers."""
        return len(self.devices) == 1 and not self.layer_wise

    @property
    def device(self) -> str:
        """The devices as the option `device` names them."""
        return ",".join(map(str, self.devices))


def choose_placement(
    config: PruneConfig,
    model: Any,
    structure: Structure,
    budget: Budget,
    devices: Sequence[torch.device],
    streamable: bool,
    stated: int | None = None,
    is_mapped: bool = True,
) -> Placement:
    """The devices of the layers of a model. By default, these are as few devices as hold all layers; if all devices
    together are too small and the layers are `streamable` (can be read one by one), one layer is held at a time. The
    free memory decides only whether the run is refused.

    Args:
        devices: the devices that may be used; all of them are used if the options name them.
        stated: bytes of memory of each device, for GPUs that are not here. Main memory is not checked then.
        is_mapped: True if the model is mapped from its files.

    Raises:
        AdaPrunerError: a stage needs more memory than is free, and `ignore_memory` is not set.
    """
    by_layer, dtype = config.layer_wise, dtype_of_weights(model, config.dtype)
    least = 1 if config.device == "auto" or by_layer else len(devices)
    if is_pruned(model.config):
        return Placement(tuple(devices[:least]), bool(by_layer))
    if stated is None:
        (host_total, host_free), memories = _total_and_free(_CPU), [_total_and_free(device) for device in devices]
    else:
        host_total, host_free, memories = sys.maxsize, sys.maxsize, [(stated, stated)] * len(devices)

    def fits(count: int) -> bool:
        stages = estimate_memory(config, model, structure, budget, devices[0], False, count, is_mapped).values()
        total = min(total for total, _ in memories[:count])
        return all(stage.device <= USABLE * total and stage.host <= USABLE * host_total for stage in stages)

    count = 1 if by_layer else next(filter(fits, range(least, len(devices) + 1)), None)
    if by_layer is None:
        by_layer = streamable and count is None
    used = tuple(devices[: count or (1 if by_layer else len(devices))])
    free = min(free for _, free in memories[: len(used)])
    about = config, model, structure, budget, used[0], by_layer, len(used), is_mapped
    for stage, memory in estimate_memory(*about).items():
        for needed, left, place in ((memory.device, free, ", ".join(map(str, used))), (memory.host, host_free, _CPU)):
            if needed > left and not config.ignore_memory:
                value = getattr(config, memory.largest, None)
                option = f"`{memory.largest}`" if value is None else f"`{memory.largest}` {value}"
                term = f"{option}; lower it, or" if hasattr(config, memory.largest) else f"the {memory.largest}:"
                ways = ["`layer_wise`"] * (streamable and not by_layer) + ["`dtype` bfloat16"] * (dtype.itemsize > 2)
                raise AdaPrunerError(
                    f"Not enough memory: {stage} needs about {needed / GIB:.3g} GiB, {left / GIB:.3g} GiB are free on"
                    f" {place}. The largest term is {term} try {' or '.join(ways or ['a smaller model'])};"
                    " `ignore_memory` starts the run all the same"
                )
    return Placement(used, by_layer)


def place_weights(model: Any, dtype: Dtype, devices: Sequence[torch.device], least: int, may_stream: bool) -> Placement:
    """The devices of the layers of a model that is only run: as few as leave a quarter of their memory free. If all
    devices together are too small, one layer is held at a time if layers `may_stream`, else all devices are used.

    Args:
        model: on the meta device.
        least: minimum number of devices.
    """
    weights = sum(weight.numel() for weight in model.parameters()) * dtype_of_weights(model, dtype).itemsize
    for count in range(least, len(devices) + 1):
        if weights / count <= USABLE * min(_total_and_free(device)[0] for device in devices[:count]):
            return Placement(tuple(devices[:count]), False)
    return Placement(tuple(devices[: 1 if may_stream else None]), may_stream)


def room_for_moments(device: torch.device, needed: Memory) -> dict[torch.device, int]:
    """Bytes that second moments may occupy while a stage uses them, on the device of the model and then in main memory:
    half of the free memory that the stage does not need. The estimates omit them, because a run works without.

    Args:
        needed: estimated memory of the stage.
    """
    needs = {_CPU: needed.host} | {device: needed.device}
    return {place: max(0, _total_and_free(place)[1] - needs[place]) // 2 for place in dict.fromkeys((device, _CPU))}


def _total_and_free(device: torch.device) -> tuple[int, int]:
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
