"""How large a GGUF file is, from the names and shapes of its tensors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import gguf
from gguf import GGMLQuantizationType

from adapruner.config import GgufType

# What llama.cpp takes where rows are no multiple of the 256 of a superblock.
_WITHOUT_SUPERBLOCKS = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}


def gguf_tensor_bytes(shapes: Mapping[str, Sequence[int]], gguf_type: GgufType) -> int:
    """Bytes of all tensors of a file, each filled up to the alignment.

    Args:
        shapes: by the names that llama.cpp has for them.
    """
    types = _q4_k_m(shapes) if gguf_type == "q4_k_m" else dict.fromkeys(shapes, GGMLQuantizationType[gguf_type.upper()])
    return sum(aligned(tensor_bytes(shape, types[name])) for name, shape in shapes.items())


def tensor_bytes(shape: Sequence[int], matrix_type: GGMLQuantizationType) -> int:
    """Bytes of a tensor that is stored in a type, or in the one that takes its place."""
    return math.prod(gguf.quant_shape_to_byte_shape(tuple(shape), stored_type(shape, matrix_type)))


def stored_type(shape: Sequence[int], matrix_type: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of a tensor in a file of a type: norms and biases are float32, and matrices whose rows do not fit into
    blocks are float16."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    for each in (matrix_type, _WITHOUT_SUPERBLOCKS.get(matrix_type, matrix_type)):
        if shape[-1] % gguf.GGML_QUANT_SIZES[each][0] == 0:
            return each
    return GGMLQuantizationType.F16


def aligned(size: int) -> int:
    """Bytes with what fills them up."""
    return math.ceil(size / gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT


def _q4_k_m(shapes: Mapping[str, Sequence[int]]) -> dict[str, GGMLQuantizationType]:
    """The mixture of llama.cpp's quantizer: six bits for the output, and for values and down projections of the first
    and the last eighth of the layers and of every third between them (`llama_tensor_get_type_impl`); models of 70
    billion parameters and of eight experts, which it treats in another way, apart."""
    layers = sorted({int(name.split(".")[1]) for name in shapes if name.startswith("blk.")})
    output = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    more = {output}
    for part in ("attn_v", "ffn_down"):
        own = [name for layer in layers if (name := f"blk.{layer}.{part}.weight") in shapes]
        count = len(own) if part == "attn_v" else len(layers)
        more |= {name for index, name in enumerate(own) if _has_more_bits(index, count)}
    return {name: GGMLQuantizationType.Q6_K if name in more else GGMLQuantizationType.Q4_K for name in shapes}


def _has_more_bits(index: int, count: int) -> bool:
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2
