"""Text to calibrate on: sources, their disjoint parts, and windows of tokens."""

from adapruner.calibration._blend import (
    BlendPart as BlendPart,
    absolute_blend as absolute_blend,
    blend_sources as blend_sources,
    has_written_part as has_written_part,
    parse_blend as parse_blend,
)
from adapruner.calibration._pool import (
    EvaluationText as EvaluationText,
    draw_windows as draw_windows,
    evaluation_text as evaluation_text,
    evenly_spaced as evenly_spaced,
    generate_windows as generate_windows,
    load_texts as load_texts,
    save_texts as save_texts,
    start_token as start_token,
    text_windows as text_windows,
)
from adapruner.calibration._probes import (
    PROBED_TOKENS as PROBED_TOKENS,
    Question as Question,
    as_chat as as_chat,
    probe_texts as probe_texts,
    prompts as prompts,
    questions as questions,
)
from adapruner.calibration._reading import (
    WINDOWS as WINDOWS,
    content_hash as content_hash,
    fingerprint as fingerprint,
    provenance as provenance,
    read_documents as read_documents,
    read_records as read_records,
    stream_documents as stream_documents,
    text_rows as text_rows,
)
from adapruner.calibration._sources import (
    SELF_GENERATED as SELF_GENERATED,
    Source as Source,
    absolute_source as absolute_source,
    parse_source as parse_source,
    register_sources as register_sources,
    source_names as source_names,
)
from adapruner.calibration._tokenizing import tokenize as tokenize, tokens_of as tokens_of
