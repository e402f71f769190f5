"""The types and sizes of the tensors in a GGUF file: from their names and shapes, or as llama.cpp wrote them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType

from adapruner.options import GgufType

# Types that llama.cpp uses instead if rows are not a multiple of the 256 weights of a superblock.
_WITHOUT_SUPERBLOCKS = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}
# Weights in a block of K-quants, and of the older types.
_K_BLOCK, _BLOCK = 256, 32


def gguf_tensor_bytes(
    shapes: Mapping[str, Sequence[int]], gguf_type: GgufType, steps: Mapping[str, int] | None = None
) -> int:
    """Bytes of all tensors of a file, each padded to the alignment.

    Args:
        shapes: of the tensors, by their names in llama.cpp.
        steps: by a part of their names, matrices whose rows will be shortened, and by multiples of how many weights:
            they are counted in the type that fits all such rows.
    """
    types = _q4_k_m(shapes) if gguf_type == "q4_k_m" else dict.fromkeys(shapes, GGMLQuantizationType[gguf_type.upper()])
    for name in shapes:
        for part, step in (steps or {}).items():
            if part in name:
                types[name] = stored_type((1, step), types[name])
    return sum(aligned(tensor_bytes(shape, types[name])) for name, shape in shapes.items())


def least_bytes_of_weight(gguf_type: GgufType) -> float:
    """Bytes of a weight in the smallest matrices of a file."""
    weights, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[gguf_type.upper().removesuffix("_M")]]
    return size / weights


def tensor_bytes(shape: Sequence[int], matrix_type: GGMLQuantizationType) -> int:
    """Bytes of a tensor in a file of a type, see `stored_type`."""
    return math.prod(gguf.quant_shape_to_byte_shape(tuple(shape), stored_type(shape, matrix_type)))


def stored_type(shape: Sequence[int], matrix_type: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of a tensor in a file of a type: norms and biases are float32, and matrices whose rows do not fit into
    blocks are float16."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    for fitting in (matrix_type, _WITHOUT_SUPERBLOCKS.get(matrix_type, matrix_type)):
        if shape[-1] % gguf.GGML_QUANT_SIZES[fitting][0] == 0:
            return fitting
    return GGMLQuantizationType.F16


def aligned(size: int) -> int:
    """Bytes, padded to the alignment."""
    return math.ceil(size / gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT


def _q4_k_m(shapes: Mapping[str, Sequence[int]]) -> dict[str, GGMLQuantizationType]:
    """The mixture of llama.cpp's quantizer: six bits for the output, and for values and down projections of the first
    and the last eighth of the layers and of every third between them (`llama_tensor_get_type_impl`). Models of 70
    billion parameters and of eight experts, which it treats in another way, are not covered."""
    layers = sorted({int(name.split(".")[1]) for name in shapes if name.startswith("blk.")})
    six_bits = {"output.weight" if "output.weight" in shapes else "token_embd.weight"}
    for projection in ("attn_v", "ffn_down"):
        names = [name for layer in layers if (name := f"blk.{layer}.{projection}.weight") in shapes]
        count = len(layers) if projection == "ffn_down" else len(names)
        first, last = count // 8, 7 * count // 8
        six_bits |= {name for at, name in enumerate(names) if at < first or at >= last or (at - first) % 3 == 2}
    return {name: GGMLQuantizationType.Q6_K if name in six_bits else GGMLQuantizationType.Q4_K for name in shapes}


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
        parts = [f"{self.k_quant_share:.1%} of the bytes are in K-quants"] if self.block == _K_BLOCK else []
        if self.fallbacks:
            parts.append(
                f"{sum(self.fallbacks.values())} of {self.matrices} matrices are stored as"
                f" {' and '.join(sorted(self.fallbacks))}, because their rows are no multiple of {self.block} long"
            )
        return "; ".join(parts)


def read_stored_types(path: Path, gguf_type: GgufType) -> StoredTypes:
    """Reads the types of a file that was written as `gguf_type`."""
    block = _K_BLOCK if "_k" in gguf_type else _BLOCK
    tensors = gguf.GGUFReader(path).tensors
    stored = Counter[str]()
    for tensor in tensors:
        stored[tensor.tensor_type.name] += int(tensor.n_bytes)
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    fallbacks = Counter(tensor.tensor_type.name for tensor in matrices if int(tensor.shape[0]) % block)
    return StoredTypes(dict(stored), dict(fallbacks), len(matrices), block)
