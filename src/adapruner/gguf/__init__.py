"""GGUF files, which llama.cpp runs: what can be written, writing it, its size, and llama.cpp itself."""

from adapruner.gguf._check import check_gguf
from adapruner.gguf._size import gguf_tensor_bytes
from adapruner.gguf._types import StoredTypes, read_stored_types
from adapruner.gguf._write import gguf_bytes, gguf_header_bytes, gguf_names, write_gguf

__all__ = [
    "StoredTypes",
    "check_gguf",
    "gguf_bytes",
    "gguf_header_bytes",
    "gguf_names",
    "gguf_tensor_bytes",
    "read_stored_types",
    "write_gguf",
]
