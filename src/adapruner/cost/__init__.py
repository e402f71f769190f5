"""What a run takes, before it begins: memory from shapes, time from a few layers that are really run."""

from adapruner.cost._estimate import GIB, Cost, choose_layer_wise, estimate_cost
from adapruner.cost._memory import MEASURED_AT_ONCE, Memory, available_memory

__all__ = ["GIB", "MEASURED_AT_ONCE", "Cost", "Memory", "available_memory", "choose_layer_wise", "estimate_cost"]
