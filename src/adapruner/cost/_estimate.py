"""Both together, and whether a model fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from adapruner.config import PruneConfig
from adapruner.cost._memory import Memory, available_memory, estimate_memory
from adapruner.cost._time import estimate_seconds
from adapruner.errors import AdaPrunerError
from adapruner.planning import Budget
from adapruner.processes import this_process
from adapruner.structure import Structure

# Estimates of the largest stage were up to 12 % too low (see docs/benchmarks.md).
_MARGIN = 1.15
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """What a run takes up to the saved model.

    Attributes:
        layer_wise: whether one layer at a time is in memory.
        memory: by stage; the program itself, half a GiB, left out.
        seconds: of the stages that take long; None where it was not asked for.
    """

    device: torch.device
    dtype: torch.dtype
    layer_wise: bool
    memory: dict[str, Memory]
    seconds: dict[str, float] | None = None

    @property
    def largest(self) -> str:
        """The stage that takes the most memory on the device."""
        return max(self.memory, key=lambda stage: self.memory[stage].device)

    @property
    def largest_beside(self) -> str:
        """The stage that takes the most memory of the machine beside the device."""
        return max(self.memory, key=lambda stage: self.memory[stage].host)

    def fits(self, available: Memory) -> bool:
        """Whether it does with so much free memory."""
        on_device, beside = self.memory[self.largest].device, self.memory[self.largest_beside].host
        return on_device * _MARGIN <= available.device and beside * _MARGIN <= available.host

    @property
    def described(self) -> str:
        """One line: the memory, and if it is known the time."""
        how = "one layer at a time" if self.layer_wise else "all layers in memory"
        line = f"{self.memory[self.largest].device / GIB:.1f} GiB at most ({self.largest}), {how}"
        if beside := self.memory[self.largest_beside].host:
            line += f", and {beside / GIB:.1f} GiB beside the GPU ({self.largest_beside})"
        if self.seconds:
            parts = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in self.seconds.items())
            line += f"; about {_duration(sum(self.seconds.values()))}: {parts}"
        return line


def estimate_cost(
    config: PruneConfig,
    model: PreTrainedModel,
    structure: Structure,
    budget: Budget,
    device: torch.device,
    timed: bool = False,
    layer_wise: bool | None = None,
) -> Cost:
    """What a run with these options takes.

    Args:
        model: on the meta device.
        budget: what is to go; where it is searched, what the search starts from.
        timed: run a few layers to know the time too.
        layer_wise: None takes what the options say.

    Raises:
        AdaPrunerError: the layers of the model differ.
    """
    if model.config.is_heterogeneous:
        raise AdaPrunerError("the cost of pruning a model whose layers differ already cannot be estimated")
    stored: Any = model.config.dtype or torch.float32
    dtype: torch.dtype = stored if config.dtype == "auto" else getattr(torch, config.dtype)
    by_layer = bool(config.layer_wise) if layer_wise is None else layer_wise
    memory = estimate_memory(config, model, structure, budget, device, dtype, by_layer)
    seconds = None
    if timed:
        seconds = estimate_seconds(config, model.config, structure, budget, device, dtype, by_layer)
    return Cost(device, dtype, by_layer, memory, seconds)


def choose_layer_wise(
    config: PruneConfig,
    model: PreTrainedModel,
    structure: Structure,
    budget: Budget,
    device: torch.device,
    streamable: bool,
) -> bool:
    """Whether to go layer by layer: as the options say, else where all layers together do not fit.

    Args:
        streamable: whether its weights can be read one layer at a time.

    Where layers differ already, the options decide alone.

    Raises:
        AdaPrunerError: it cannot fit.
    """
    if model.config.is_heterogeneous:
        return bool(config.layer_wise)
    beside = available_memory(torch.device("cpu")) // this_process().count_here
    on_cpu = device.type == "cpu"
    available = Memory(beside) if on_cpu else Memory(available_memory(device), beside)
    ways = [config.layer_wise] if config.layer_wise is not None else [False, True] if streamable else [False]
    costs = [estimate_cost(config, model, structure, budget, device, layer_wise=way) for way in ways]
    for cost in costs:
        if cost.fits(available):
            return cost.layer_wise
    advice = "" if costs[-1].layer_wise or not streamable else "--layer-wise takes less; so do "
    raise AdaPrunerError(
        f"{costs[-1].described}, where {available.device / GIB:.1f} GiB are free on {device}"
        f"{'' if on_cpu else f' and {beside / GIB:.1f} GiB beside it'}: {advice}--dtype bfloat16,"
        " a smaller --pool, --compensation-windows and --objective-windows"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
