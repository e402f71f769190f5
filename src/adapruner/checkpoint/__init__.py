"""Checkpoints: Hugging Face folders that load with and without this package, GGUF files, uploads."""

from adapruner.checkpoint._folder import is_replaceable, read_origin, save_checkpoint, write_card
from adapruner.checkpoint._gguf import gguf_bytes, gguf_header_bytes, gguf_names, write_gguf
from adapruner.checkpoint._gguf_checks import check_gguf
from adapruner.checkpoint._gguf_sizes import gguf_tensor_bytes
from adapruner.checkpoint._gguf_types import StoredTypes, read_stored_types
from adapruner.checkpoint._hub import check_push, push

__all__ = [
    "StoredTypes",
    "check_gguf",
    "check_push",
    "gguf_bytes",
    "gguf_header_bytes",
    "gguf_names",
    "gguf_tensor_bytes",
    "is_replaceable",
    "push",
    "read_origin",
    "read_stored_types",
    "save_checkpoint",
    "write_card",
    "write_gguf",
]
