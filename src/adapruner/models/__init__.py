"""Loading models, and what must be known of a family of models to prune it."""

from adapruner.models._architecture import Architecture, ProjectionNames, RowKind, architecture_of, known_architectures
from adapruner.models._loading import (
    ModelLocation,
    computes_bfloat16_natively,
    copy_in_dtype,
    empty_model,
    find_model,
    in_fastest_dtype,
    load_config,
    load_model,
    load_tokenizer,
    quiet_transformers,
    resolve_device,
)
from adapruner.models.modeling_pruned import PRUNED_CLASSES, STOCK_CLASSES

__all__ = [
    "PRUNED_CLASSES",
    "STOCK_CLASSES",
    "Architecture",
    "ModelLocation",
    "ProjectionNames",
    "RowKind",
    "architecture_of",
    "computes_bfloat16_natively",
    "copy_in_dtype",
    "empty_model",
    "find_model",
    "in_fastest_dtype",
    "known_architectures",
    "load_config",
    "load_model",
    "load_tokenizer",
    "quiet_transformers",
    "resolve_device",
]
