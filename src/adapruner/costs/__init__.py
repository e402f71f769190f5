"""The cost of a pruned model before it exists: bytes in a file or in memory, and time."""

from adapruner.costs._bytes import (
    bytes_of_model as bytes_of_model,
    cache_bytes as cache_bytes,
    dtype_in as dtype_in,
    is_gguf as is_gguf,
    memory_costs as memory_costs,
    size_costs as size_costs,
)
from adapruner.costs._latency import (
    Latencies as Latencies,
    check_latencies as check_latencies,
    describe_measuring as describe_measuring,
    layers_to_measure as layers_to_measure,
    measure_latencies as measure_latencies,
    measured_model as measured_model,
    read_latencies as read_latencies,
    timer as timer,
    timings as timings,
)
