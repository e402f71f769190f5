"""Text to calibrate on: sources, their disjoint parts, and windows of tokens."""

from adapruner.calibration._pool import (
    EvaluationText,
    draw_windows,
    evaluation_text,
    evenly_spaced,
    generate_windows,
    load_texts,
    save_texts,
    start_token,
    text_windows,
    upper_case_windows,
)
from adapruner.calibration._probes import OPENINGS, probe_texts
from adapruner.calibration._reading import (
    WINDOWS,
    content_hash,
    fingerprint,
    provenance,
    read_documents,
    read_records,
    read_windows,
    stream_documents,
    text_rows,
)
from adapruner.calibration._sources import (
    SELF_GENERATED,
    Source,
    absolute_source,
    parse_source,
    register_sources,
    source_names,
)

__all__ = [
    "OPENINGS",
    "SELF_GENERATED",
    "WINDOWS",
    "EvaluationText",
    "Source",
    "absolute_source",
    "content_hash",
    "draw_windows",
    "evaluation_text",
    "evenly_spaced",
    "fingerprint",
    "generate_windows",
    "load_texts",
    "parse_source",
    "probe_texts",
    "provenance",
    "read_documents",
    "read_records",
    "read_windows",
    "register_sources",
    "save_texts",
    "source_names",
    "start_token",
    "stream_documents",
    "text_rows",
    "text_windows",
    "upper_case_windows",
]
