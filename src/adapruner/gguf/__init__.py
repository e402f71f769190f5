"""GGUF files for llama.cpp: checking that a model can be exported, writing it, and its size."""

from adapruner.gguf._check import (
    LLAMA_LIKE as LLAMA_LIKE,
    check_gguf as check_gguf,
    head_dim as head_dim,
    layer_counts as layer_counts,
)
from adapruner.gguf._size import least_bytes_of_weight as least_bytes_of_weight
from adapruner.gguf._types import StoredTypes as StoredTypes, read_stored_types as read_stored_types
from adapruner.gguf._write import gguf_bytes as gguf_bytes, write_gguf as write_gguf
