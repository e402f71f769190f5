"""Text to calibrate on: sources, their disjoint parts, and windows of tokens."""

from adapruner.calibration._pool import draw_windows, evenly_spaced, generate_windows, text_windows
from adapruner.calibration._sources import (
    SELF_GENERATED,
    Part,
    Source,
    parse_source,
    provenance,
    read_documents,
    read_records,
)

__all__ = [
    "SELF_GENERATED",
    "Part",
    "Source",
    "draw_windows",
    "evenly_spaced",
    "generate_windows",
    "parse_source",
    "provenance",
    "read_documents",
    "read_records",
    "text_windows",
]
