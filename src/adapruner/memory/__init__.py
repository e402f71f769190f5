"""The memory that a pruning run needs, from shapes, and where a model is placed accordingly."""

from adapruner.memory._placement import (
    GIB,
    USABLE,
    Placement,
    choose_placement,
    place_weights,
    room_for_moments,
)
from adapruner.memory._stages import (
    MEASURED_AT_ONCE,
    TOKENS_FOR_COSTS,
    TOKENS_FOR_WHOLE,
    Memory,
    dtype_of_weights,
    estimate_memory,
    windows_of,
)

__all__ = [
    "GIB",
    "MEASURED_AT_ONCE",
    "TOKENS_FOR_COSTS",
    "TOKENS_FOR_WHOLE",
    "USABLE",
    "Memory",
    "Placement",
    "choose_placement",
    "dtype_of_weights",
    "estimate_memory",
    "place_weights",
    "room_for_moments",
    "windows_of",
]
