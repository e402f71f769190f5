"""The memory that a pruning run needs, from shapes, and the placement of a model accordingly."""

from adapruner.memory._placement import (
    GIB as GIB,
    USABLE as USABLE,
    Placement as Placement,
    choose_placement as choose_placement,
    place_weights as place_weights,
    room_for_moments as room_for_moments,
)
from adapruner.memory._stages import (
    MEASURED_AT_ONCE as MEASURED_AT_ONCE,
    TOKENS_FOR_COSTS as TOKENS_FOR_COSTS,
    TOKENS_FOR_WHOLE as TOKENS_FOR_WHOLE,
    Memory as Memory,
    dtype_of_weights as dtype_of_weights,
    estimate_memory as estimate_memory,
    windows_of as windows_of,
)
