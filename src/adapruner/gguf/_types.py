"""The types that llama.cpp's quantizer chose for the matrices of a file."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gguf

from adapruner.config import GgufType

# Weights in a block of K-quants, and of the older types.
_K_BLOCK, _BLOCK = 256, 32


@dataclass(frozen=True)
class StoredTypes:
    """The types of the tensors in a GGUF file.

    Attributes:
        tensor_bytes: bytes of all tensors of a type, by its name in llama.cpp.
        fallbacks: the number of matrices in another type than requested, because the length of their rows is not a
            multiple of `block`; by the name of that type.
        matrices: the number of matrices.
        block: weights that the requested type stores together.
    """

    tensor_bytes: dict[str, int]
    fallbacks: dict[str, int]
    matrices: int
    block: int

    @property
    def k_quant_share(self) -> float:
        """The fraction of the bytes of all tensors that is in K-quants."""
        in_k_quants = sum(size for name, size in self.tensor_bytes.items() if re.fullmatch("Q[2-6]_K", name))
        return in_k_quants / sum(self.tensor_bytes.values())

    @property
    def sentence(self) -> str:
        """The storage in one line, for the user."""
        share = f"{self.k_quant_share:.1%} of the bytes are in K-quants" if self.block == _K_BLOCK else ""
        fallen = sum(self.fallbacks.values())
        fallback = (
            f"{fallen} of {self.matrices} matrices are stored as {' and '.join(sorted(self.fallbacks))}, because their"
            f" rows are no multiple of {self.block} long"
        )
        return "; ".join(filter(None, [share, fallback if fallen else ""]))


def read_stored_types(path: Path, gguf_type: GgufType) -> StoredTypes:
    """Reads the types of a file that was written as `gguf_type`."""
    block = _K_BLOCK if "_k" in gguf_type else _BLOCK
    tensors = gguf.GGUFReader(path).tensors
    tensor_bytes, fallbacks = Counter[str](), Counter[str]()
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    for tensor in tensors:
        tensor_bytes[tensor.tensor_type.name] += int(tensor.n_bytes)
    for tensor in matrices:
        if int(tensor.shape[0]) % block:
            fallbacks[tensor.tensor_type.name] += 1
    return StoredTypes(dict(tensor_bytes), dict(fallbacks), len(matrices), block)
