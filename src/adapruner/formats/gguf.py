"""Writing a model as one GGUF file, for llama.cpp and tools built on it."""

import contextlib
import os
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import atomic_path, staging_folder
from adapruner.formats import Export, register_format
from adapruner.formats.gguf_checks import (
    QUANTIZED_BY_LLAMA_CPP,
    check_gguf,
    head_dim,
    layer_counts,
    layers_differ,
    stored_type,
    tensor_bytes,
)
from adapruner.formats.gguf_tokenizer import add_tokenizer
from adapruner.options import GgufType

# Architectures of llama.cpp that rotate neighbouring rows.
_ROTATE_NEIGHBOURS = ("llama", "deci")

# The types of the exact file that llama.cpp's quantizer reads.
_EXACT_TYPES: dict[torch.dtype, GgufType] = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def write_gguf(model: PreTrainedModel, tokenizer: Tokenizer, path: Path, gguf_type: GgufType = "f16") -> None:
    """Writes weights, hyperparameters and tokenizer into one file, which appears whole or not at all.

    Layers may differ in heads and feed-forward channels in Llama, Mistral and Qwen 2.
    Tensors are converted one at a time: in addition to the model, only one tensor is in memory.

    Args:
        gguf_type: the type of matrices. Norms and biases are always float32; `q8_0` stores matrices as float16 if the
            length of their rows is not a multiple of 32. Other quantizations are made by llama.cpp, from a temporary
            file in the dtype of the model.
    """
    check_gguf(model, gguf_type)
    with staging_folder(path) as made:
        with atomic_path(made) as partial:
            if gguf_type in QUANTIZED_BY_LLAMA_CPP:
                exact = made.with_name(f"{made.name}.exact")
                _write(model, tokenizer, exact, path.stem, _EXACT_TYPES.get(model.dtype, "f32"))
                _quantize(exact, partial, gguf_type)
            else:
                _write(model, tokenizer, partial, path.stem, gguf_type)
        os.replace(made, path)


def _quantize(exact: Path, output: Path, gguf_type: GgufType) -> None:
    """Has llama.cpp, through the optional package cyllama, quantize a file; it chooses the type of each matrix."""
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    parameters = llama_cpp.LlamaModelQuantizeParams()
    parameters.ftype = int(LlamaFileType[f"MOSTLY_{gguf_type.upper()}"])
    parameters.nthread = torch.get_num_threads()
    try:
        llama_cpp.model_quantize(str(exact), str(output), parameters)
    except RuntimeError:
        raise AdaPrunerError(f"llama.cpp could not write the model as {gguf_type}: choose another type") from None


def _write(model: PreTrainedModel, tokenizer: Tokenizer, path: Path, name: str, gguf_type: GgufType) -> None:
    """Writes the file in a type that gguf-py can write."""
    matrix_type = GGMLQuantizationType[gguf_type.upper()]
    rotates_neighbours = _llama_cpp_architecture(model.config) in _ROTATE_NEIGHBOURS
    with contextlib.closing(GGUFWriter(None, _llama_cpp_architecture(model.config))) as writer:
        _add_hyperparameters(writer, model.config)
        add_tokenizer(writer, tokenizer, vocabulary=model.config.vocab_size)
        writer.add_type("model")
        writer.add_name(name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(LlamaFileType["ALL_F32" if gguf_type == "f32" else f"MOSTLY_{matrix_type.name}"])
        tensors = _named_tensors(model)
        for tensor_name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            size, stored = tensor_bytes(shape, matrix_type), stored_type(shape, matrix_type)
            writer.add_tensor_info(tensor_name, shape, np.dtype(np.float32), size, raw_dtype=stored)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor in tensors.items():
            if rotates_neighbours and re.search(r"attn_[qk]\.", tensor_name):
                # Rotary embeddings rotate pairs of rows: transformers pairs row i of a head with row i + head_dim / 2,
                # llama.cpp, in `llama` and `deci`, row 2i with row 2i + 1.
                halves = tensor.unflatten(0, (-1, 2, head_dim(model.config) // 2))
                tensor = halves.transpose(1, 2).flatten(0, 2)
            values: NDArray[np.float32] = tensor.detach().to("cpu", torch.float32).numpy()
            writer.write_tensor_data(gguf.quantize(values, stored_type(tensor.shape, matrix_type)))


def _tensor_names(model: PreTrainedModel) -> dict[str, str]:
    """The name in llama.cpp of every parameter of a model, by its path; refuses one that llama.cpp does not have."""
    config = model.config
    # Qwen 3 has every parameter of the other families.
    architecture = gguf.MODEL_ARCH.GEMMA3 if config.model_type == "gemma3_text" else gguf.MODEL_ARCH.QWEN3
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {}
    for path, _ in model.named_parameters():
        name = known.get_name(path, (".weight", ".bias"))
        if name is None:
            raise AdaPrunerError(f"GGUF export does not know the parameter {path}; merge adapters into the model first")
        names[path] = name
    return names


def _llama_cpp_architecture(config: PreTrainedConfig) -> str:
    """Where layers differ, `deci` computes what `llama` computes."""
    if config.model_type == "gemma3_text":
        return "gemma3"
    if layers_differ(config):
        return "deci"
    if config.model_type == "qwen2":
        # llama.cpp's architecture has heads as wide as the hidden size.
        is_full_width = config.per_layer_config[0].num_attention_heads * head_dim(config) == config.hidden_size
        return "qwen2" if is_full_width and config.rope_parameters["rope_type"] != "llama3" else "llama"
    return "qwen3" if config.model_type == "qwen3" else "llama"


def _add_hyperparameters(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # llama.cpp reads the width of heads from the first layer: without attention there, the file has one head of zeros.
    first, *others = layer_counts(config)
    written = [first if first[0] else (1, 1, first[2]), *others]
    adders = (writer.add_head_count, writer.add_head_count_kv, writer.add_feed_forward_length)
    for add, counts in zip(adders, zip(*written, strict=True), strict=True):
        add(counts[0] if len(set(counts)) == 1 else list(counts))
    # The default would be the hidden size divided by the heads.
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        rope = rope["full_attention"]  # the other layers have fixed ones
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):  # Llama 3's scaling is a tensor
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _named_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor of the file by its name in llama.cpp, with the values that llama.cpp computes with; an output layer
    that shares the embedding has none."""
    config, names = model.config, _tensor_names(model)
    # llama.cpp expects no norm in front of an attention that was removed.
    without_attention = [index for index, (heads, _, _) in enumerate(layer_counts(config)) if not heads]
    unread = tuple(f"model.layers.{index}.input_layernorm." for index in without_attention)
    tensors: dict[str, Tensor] = {}
    for path, parameter in model.named_parameters():
        if path.startswith(unread):
            continue
        # Weights of Gemma's norms are stored less one, which is added in float32.
        is_less_one = config.model_type == "gemma3_text" and names[path].endswith("norm.weight")
        tensors[names[path]] = parameter.float() + 1 if is_less_one else parameter
    if 0 in without_attention:  # llama.cpp requires attention in the first layer
        hidden, width = config.hidden_size, head_dim(config)
        shapes = {"norm": (hidden,), "output": (hidden, width), **dict.fromkeys("qkv", (width, hidden))}
        tensors |= {f"blk.0.attn_{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    if config.rope_parameters.get("rope_type") == "llama3":
        # [half the width of a head]: the divisor of each rotary frequency.
        exponents = torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config.per_layer_config[0], torch.device("cpu"))
        tensors["rope_freqs.weight"] = config.rope_parameters["rope_theta"] ** -exponents / scaled
    return tensors


@register_format("gguf", check_gguf, is_file=True)
def _export(export: Export) -> None:
    write_gguf(export.model, export.tokenizer, export.path, export.gguf_type)
