"""Loading models, and what must be known of a family of models to prune it."""

from adapruner.models._architecture import (
    Architecture,
    ProjectionNames,
    RowKind,
    architecture_of,
    check_length,
    check_tokens,
    known_architectures,
    register_architectures,
)
from adapruner.models._device import (
    computes_bfloat16_natively,
    copy_in_dtype,
    in_fastest_dtype,
    resolve_device,
    trial_dtype,
)
from adapruner.models._fingerprint import fingerprint
from adapruner.models._layers import (
    LayerCall,
    decoder_layers,
    enter_layers,
    is_streamed,
    loaded_layer,
    overwrite_weight,
    skipping_layers,
    stream_from_memory,
    whole_state,
)
from adapruner.models._loading import (
    ModelLocation,
    check_streamable,
    empty_model,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from adapruner.models.modeling_pruned import PRUNED_CLASSES, STOCK_CLASSES

__all__ = [
    "PRUNED_CLASSES",
    "STOCK_CLASSES",
    "Architecture",
    "LayerCall",
    "ModelLocation",
    "ProjectionNames",
    "RowKind",
    "architecture_of",
    "check_length",
    "check_streamable",
    "check_tokens",
    "computes_bfloat16_natively",
    "copy_in_dtype",
    "decoder_layers",
    "empty_model",
    "enter_layers",
    "find_model",
    "fingerprint",
    "in_fastest_dtype",
    "is_streamed",
    "known_architectures",
    "load_config",
    "load_model",
    "load_tokenizer",
    "loaded_layer",
    "overwrite_weight",
    "quiet_transformers",
    "register_architectures",
    "resolve_device",
    "skipping_layers",
    "stream_from_memory",
    "trial_dtype",
    "whole_state",
]
