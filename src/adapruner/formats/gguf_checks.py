"""Which models llama.cpp computes exactly, and the types in which a GGUF file stores tensors."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import gguf
from gguf import GGMLQuantizationType
from transformers import PreTrainedConfig, PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.model.architecture import architecture_of, lacks_attention
from adapruner.options import GgufType

# Families that llama.cpp's architectures `llama` and `deci` compute: Qwen 2 is Llama with biases on query, key, value.
LLAMA_LIKE = ("llama", "mistral", "qwen2")

# Made by llama.cpp's own quantizer.
QUANTIZED_BY_LLAMA_CPP = ("q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q3_k_m")

# Types of rotary embeddings that can be written, and the settings that each may have in addition to the base.
_ROPE_SETTINGS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}


def check_gguf(model: PreTrainedModel, gguf_type: GgufType = "f16") -> None:
    """Refuses a model that llama.cpp would not compute exactly, or a type that needs llama.cpp, if that is not
    installed. Needs no weights."""
    if gguf_type not in get_args(GgufType):
        raise AdaPrunerError(f"`gguf_type` {gguf_type!r}: expected one of {', '.join(get_args(GgufType))}")
    if gguf_type in QUANTIZED_BY_LLAMA_CPP and find_spec("cyllama") is None:
        raise AdaPrunerError("this needs llama.cpp: pip install '.[gguf]' in a checkout, which is the package cyllama")
    config = model.config
    if config.model_type not in (*LLAMA_LIKE, "qwen3", "gemma3_text"):
        raise AdaPrunerError(
            f"GGUF export knows {', '.join(LLAMA_LIKE)}, qwen3 and gemma3_text, not {config.model_type!r};"
            " use llama.cpp's own converter on a uniform checkpoint"
        )
    if config.model_type == "gemma3_text":
        _check_gemma3(model)
        return
    if config.hidden_act != "silu":
        raise AdaPrunerError(f"llama.cpp computes this family with silu only, not with {config.hidden_act}")
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window and "sliding_attention" in layer_types and window < config.max_position_embeddings:
        raise AdaPrunerError(
            f"llama.cpp has no sliding-window attention in this family, but this model has a window of {window} tokens:"
            f" to export it exactly, set max_position_embeddings={window} in its config.json (now"
            f" {config.max_position_embeddings})"
        )
    _check_rope(config)
    if config.model_type == "qwen3":
        _check_plain_layers(model)


def layer_counts(config: PreTrainedConfig) -> list[tuple[int, int, int]]:
    """Query heads, key/value heads and feed-forward channels of every layer."""
    counts = []
    for layer in config.per_layer_config:
        heads = (0, 0) if lacks_attention(layer) else (layer.num_attention_heads, layer.num_key_value_heads)
        counts.append((*heads, layer.intermediate_size))
    return counts


def layers_differ(config: PreTrainedConfig) -> bool:
    """True if layers differ in the number of heads or channels."""
    return len(set(layer_counts(config))) > 1


def head_dim(config: PreTrainedConfig) -> int:
    return architecture_of(config).head_dim(config.per_layer_config[0])


def _check_rope(config: PreTrainedConfig) -> None:
    plain = ("partial_rotary_factor", 1)
    settings = {item[0] for item in config.rope_parameters.items() if item[1] is not None and item != plain}
    rope_type = config.rope_parameters["rope_type"]
    supported = [name for name in _ROPE_SETTINGS if name != "llama3" or config.model_type in LLAMA_LIKE]
    unknown = sorted(settings - {"rope_type", "type", "rope_theta"} - _ROPE_SETTINGS.get(rope_type, settings))
    if rope_type not in supported or unknown:
        raise AdaPrunerError(
            f"rotary embeddings of the type {' with '.join([rope_type, *unknown])} cannot be exported to GGUF for"
            f" {config.model_type}, only {', '.join(supported)}; change `rope_parameters` in config.json, where the"
            " model allows it"
        )


def _check_gemma3(model: PreTrainedModel) -> None:
    """llama.cpp's architecture `gemma3` has one width for all layers, and fixed values of many config fields."""
    _check_plain_layers(model)
    config, rope = model.config, model.config.rope_parameters
    # Of 4B and more, positions of the layers that attend to everything are scaled.
    scaling, of_all = rope["full_attention"]["rope_type"], ("default", "linear")
    # Every sixth layer attends to everything.
    layers = range(1, config.num_hidden_layers + 1)
    expected_types = ["sliding_attention" if layer % 6 else "full_attention" for layer in layers]
    fixed = {
        "hidden_activation": (config.hidden_activation, "gelu_pytorch_tanh"),
        "layer_types": (config.layer_types, expected_types),
        "query_pre_attn_scalar": (config.query_pre_attn_scalar, head_dim(config)),
        "final_logit_softcapping": (config.final_logit_softcapping, None),
        "attn_logit_softcapping": (config.attn_logit_softcapping, None),
        "use_bidirectional_attention": (bool(config.use_bidirectional_attention), False),
        "rope_parameters": (rope["sliding_attention"], {"rope_type": "default", "rope_theta": 10_000.0}),
        "rope_type of full_attention": (scaling, scaling if scaling in of_all else " or ".join(of_all)),
    }
    for name, (value, expected) in fixed.items():
        if value != expected:
            raise AdaPrunerError(f"llama.cpp computes gemma3 with {name} {expected} only, not {value}")


def _check_plain_layers(model: PreTrainedModel) -> None:
    """Refuses biases, and layers that differ in width."""
    family = model.config.model_type
    if biases := [name for name, _ in model.named_parameters() if name.endswith(".bias")]:
        raise AdaPrunerError(
            f"llama.cpp reads no biases in {family} models, this one has {len(biases)} ({biases[0]}, …);"
            " prune with a compensation that adds none, as `compensation` least-squares"
        )
    if layers_differ(model.config):
        raise AdaPrunerError(
            "llama.cpp runs layers that differ in width in Llama, Mistral and Qwen 2 only, not in"
            f" {family}: prune with `layout` uniform"
        )


# Types that llama.cpp uses instead if rows are not a multiple of the 256 weights of a superblock.
_WITHOUT_SUPERBLOCKS = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}
# Weights in a block of K-quants, and of the older types.
_K_BLOCK, _BLOCK = 256, 32


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
    def sentence(self) -> str:
        """The storage in one line, for the user."""
        in_k_quants = sum(size for name, size in self.tensor_bytes.items() if re.fullmatch("Q[2-6]_K", name))
        share = in_k_quants / sum(self.tensor_bytes.values())
        parts = [f"{share:.1%} of the bytes are in K-quants"] if self.block == _K_BLOCK else []
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
