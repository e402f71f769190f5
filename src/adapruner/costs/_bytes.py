"""Bytes of a pruned model: of its file in a format, and in memory together with its KV cache. They are computed from
the shapes of all tensors; no model is built."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.config import GgufType, TargetFormat
from adapruner.evaluation import new_cache
from adapruner.gguf import gguf_bytes, gguf_header_bytes, gguf_names, gguf_tensor_bytes
from adapruner.models import architecture_of
from adapruner.planning import Costs
from adapruner.structure import Structure

Shape = tuple[int, ...]
# As safetensors writes their names.
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def stored_shapes(model: PreTrainedModel) -> dict[str, Shape]:
    """The shapes of the tensors in a checkpoint of a model, by name, tied ones once."""
    buffers = dict(model.named_buffers())
    stored = dict(model.named_parameters()) | {
        name: tensor for name, tensor in model.state_dict().items() if name in buffers
    }
    return {name: tuple(tensor.shape) for name, tensor in stored.items()}


def shapes_after(model: PreTrainedModel, structure: Structure, counts: Sequence[int]) -> dict[str, Shape]:
    """The shapes of a pruned model by name, with its layers renumbered.

    Args:
        model: the dense model; on the meta device is enough.
        counts: number of groups that each block keeps, in the order of `structure.blocks`.
    """
    architecture, shapes = architecture_of(model.config), stored_shapes(model)
    removed_layers = structure.removed_layers(counts)
    removed = [f"{architecture.layers}.{layer}." for layer in removed_layers]
    for block, count in zip(structure.blocks, counts, strict=True):
        if not count and (module := architecture.module_of(block.kind)):
            removed.append(f"{architecture.layers}.{block.layer}.{module}.")
        for piece in block.slices:
            shape, axis = list(shapes[piece.parameter]), piece.stored_axis + bool(piece.experts)
            shape[axis] -= (block.groups - count) // (piece.experts or 1) * piece.width
            shapes[piece.parameter] = tuple(shape)
    kept = [layer for layer in range(structure.layers) if layer not in removed_layers]
    numbers = {f"{architecture.layers}.{old}.": f"{architecture.layers}.{new}." for new, old in enumerate(kept)}
    return {_renamed(name, numbers): shape for name, shape in shapes.items() if not name.startswith(tuple(removed))}


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(prefix, "") + name.removeprefix(prefix)


def dtype_in(target_format: TargetFormat, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the stored weights and of the cache; float16 for GGUF, which runs with a cache in float16.

    Args:
        dtype: of the weights; returned for `auto`.
    """
    if target_format == "auto":
        return dtype
    stored: torch.dtype = torch.float16 if _gguf_type(target_format) else getattr(torch, target_format)
    return stored


def is_gguf(target_format: TargetFormat) -> bool:
    """True for the formats of GGUF."""
    return _gguf_type(target_format) is not None


def _gguf_type(target_format: TargetFormat) -> GgufType | None:
    kind, _, gguf_type = target_format.partition(":")
    return cast(GgufType, gguf_type) if kind == "gguf" else None


def size_costs(
    model: PreTrainedModel, structure: Structure, target_format: TargetFormat, dtype: torch.dtype, tokenizer: Tokenizer
) -> Costs:
    """Bytes of the file of a pruned model.

    For safetensors, that is the file of the weights, without the files of config and tokenizer. A GGUF file holds
    everything.

    Args:
        model: the dense model; on the meta device is enough.

    Raises:
        AdaPrunerError: the model cannot be written as GGUF.
    """
    gguf_type = _gguf_type(target_format)
    if gguf_type is None:
        return lambda counts: safetensors_bytes(shapes_after(model, structure, counts), dtype_in(target_format, dtype))
    header = gguf_header_bytes(model, tokenizer)
    names = gguf_names(model)

    def gguf_costs(counts: Sequence[int]) -> float:
        shapes = shapes_after(model, structure, counts)
        return header + gguf_tensor_bytes({names[path]: shape for path, shape in shapes.items()}, gguf_type)

    return gguf_costs


def bytes_of_model(
    model: PreTrainedModel, tokenizer: Tokenizer, target_format: TargetFormat, dtype: torch.dtype
) -> int:
    """Bytes of the file of a model, which may be on the meta device."""
    if gguf_type := _gguf_type(target_format):
        return gguf_bytes(model, tokenizer, gguf_type)
    return safetensors_bytes(stored_shapes(model), dtype_in(target_format, dtype))


def safetensors_bytes(shapes: Mapping[str, Shape], dtype: torch.dtype) -> int:
    """Bytes of one safetensors file as transformers writes it. If a model is split into several files, their headers
    add some hundred bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + 8 * math.ceil(length / 8) + end


def cache_bytes(model: PreTrainedModel, batch: int, context: int, dtype: torch.dtype) -> list[int]:
    """Bytes that each entry of the cache of a model holds after `context` tokens of `batch` sequences. The model is run
    on the meta device, which costs nothing and covers every kind of cache."""
    (cache,) = (named := new_cache(model, model.config)).values()
    with torch.no_grad():
        tokens = torch.zeros(batch, context, dtype=torch.long, device="meta")
        model(tokens, use_cache=True, logits_to_keep=1, **named)
    held = [[value for value in vars(layer).values() if isinstance(value, torch.Tensor)] for layer in cache.layers]
    # Integers are counts of tokens; keys, values and states are not.
    return [sum(state.numel() * dtype.itemsize for state in states if state.is_floating_point()) for states in held]


def memory_costs(structure: Structure, size: Costs, caches: list[int]) -> Costs:
    """Bytes of the weights, stored as in the file, and of the cache.

    Args:
        size: bytes of the file.
        caches: bytes of the cache of each layer of the dense model.
    """

    def costs(counts: Any) -> float:
        removed, cache = structure.removed_layers(counts), dict(enumerate(caches))
        for block, count in zip(structure.blocks, counts, strict=True):
            if block.kind == "heads":
                # Where single query heads are removed, all keys and values are kept.
                cache[block.layer] *= count / block.groups if block.strata == 1 else bool(count)
        return size(counts) + sum(layer_bytes for layer, layer_bytes in cache.items() if layer not in removed)

    return costs
