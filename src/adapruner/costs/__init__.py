"""What a pruned model costs beside parameters, before it exists: bytes in a file or in memory, and time."""

from adapruner.costs._bytes import (
    bytes_in,
    bytes_of_model,
    cache_bytes,
    dtype_in,
    is_gguf,
    memory_costs,
    safetensors_bytes,
    size_costs,
)
from adapruner.costs._latency import (
    Latencies,
    check_latencies,
    describe_measuring,
    layers_to_measure,
    measure_latencies,
    measured_model,
    read_latencies,
    timer,
    timings,
)
from adapruner.costs._shapes import Shape, shapes_after, stored_shapes
from adapruner.costs._target import TargetOutcome, target_of

__all__ = [
    "Latencies",
    "Shape",
    "TargetOutcome",
    "bytes_in",
    "bytes_of_model",
    "cache_bytes",
    "check_latencies",
    "describe_measuring",
    "dtype_in",
    "is_gguf",
    "layers_to_measure",
    "measure_latencies",
    "measured_model",
    "memory_costs",
    "read_latencies",
    "safetensors_bytes",
    "shapes_after",
    "size_costs",
    "stored_shapes",
    "target_of",
    "timer",
    "timings",
]
