"""Text to calibrate on: sources, their disjoint parts, and windows of tokens."""

from adapruner.calibration._pool import draw_windows, generate_windows, text_windows
from adapruner.calibration._sources import (
    DATA_FOLDERS_VARIABLE,
    SELF_GENERATED,
    Part,
    Source,
    parse_source,
    read_documents,
)

__all__ = [
    "DATA_FOLDERS_VARIABLE",
    "SELF_GENERATED",
    "Part",
    "Source",
    "draw_windows",
    "generate_windows",
    "parse_source",
    "read_documents",
    "text_windows",
]
