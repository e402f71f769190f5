"""What a pruned model costs beside parameters, before it exists: bytes in a file or in memory, and time."""

from adapruner.costs._bytes import (
    bytes_of_model,
    cache_bytes,
    dtype_in,
    is_gguf,
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
from adapruner.costs._target import target_of

__all__ = [
    "Latencies",
    "bytes_of_model",
    "cache_bytes",
    "check_latencies",
    "describe_measuring",
    "dtype_in",
    "is_gguf",
    "layers_to_measure",
    "measure_latencies",
    "measured_model",
    "read_latencies",
    "target_of",
    "timer",
    "timings",
]
