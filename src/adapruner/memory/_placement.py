"""Where the layers of a model are, by the available memory."""

from __future__ import annotations

import contextlib
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
# All layers are held in memory where that leaves a quarter of the machine's memory to everything else.
USABLE = 0.75
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """The devices over which the layers of a model are spread; or with `layer_wise`, the one on which one layer at a
    time is."""

    devices: tuple[torch.device, ...]
    layer_wise: bool

    @property
    def on_one_device(self) -> bool:
        """Whether one device holds all layers."""
        return len(self.devices) == 1 and not self.layer_wise

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
