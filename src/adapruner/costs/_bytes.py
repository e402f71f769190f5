"""Bytes of a pruned model: of its file in a format, and in memory together with its KV cache."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.checkpoint import gguf_bytes, gguf_header_bytes, gguf_names, gguf_tensor_bytes
from adapruner.config import GgufType, TargetFormat
from adapruner.costs._shapes import Shape, shapes_after, stored_shapes
from adapruner.evaluation import new_cache
from adapruner.planning import Costs
from adapruner.structure import Structure

# As safetensors writes their names.
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def dtype_in(target_format: TargetFormat, dtype: torch.dtype) -> torch.dtype:
    """What weights are stored in and computed with; GGUF is run with a cache in float16.

    Args:
        dtype: of the weights, which `auto` stands for.
    """
    if target_format == "auto":
        return dtype
    found: torch.dtype = torch.float16 if _gguf_type(target_format) else getattr(torch, target_format)
    return found


def is_gguf(target_format: TargetFormat) -> bool:
    """Whether a format is one of GGUF."""
    return _gguf_type(target_format) is not None


def _gguf_type(target_format: TargetFormat) -> GgufType | None:
    kind, _, gguf_type = target_format.partition(":")
    return cast(GgufType, gguf_type) if kind == "gguf" else None


def bytes_in(
    target_format: TargetFormat, dtype: torch.dtype, model: PreTrainedModel, tokenizer: Tokenizer
) -> Callable[[Mapping[str, Shape]], int]:
    """What gives the bytes of a file from the shapes of all tensors.

    Of safetensors, that is the file of the weights: config and tokenizer are files of their own. A GGUF file is all
    there is.

    Args:
        model: the dense model; on the meta device is enough.

    Raises:
        AdaPrunerError: the model cannot be written as GGUF.
    """
    gguf_type = _gguf_type(target_format)
    if gguf_type is None:
        return lambda shapes: safetensors_bytes(shapes, dtype_in(target_format, dtype))
    names, header = gguf_names(model), gguf_header_bytes(model, tokenizer)
    return lambda shapes: header + gguf_tensor_bytes({names[own]: shape for own, shape in shapes.items()}, gguf_type)


def bytes_of_model(
    model: PreTrainedModel, tokenizer: Tokenizer, target_format: TargetFormat, dtype: torch.dtype
) -> int:
    """Bytes of the file of a model that exists; on the meta device is enough."""
    if gguf_type := _gguf_type(target_format):
        return gguf_bytes(model, tokenizer, gguf_type)
    return safetensors_bytes(stored_shapes(model), dtype_in(target_format, dtype))


def safetensors_bytes(shapes: Mapping[str, Shape], dtype: torch.dtype) -> int:
    """Bytes of one safetensors file as transformers writes it; of a model that is split into several, their headers
    add some hundred bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + 8 * math.ceil(length / 8) + end


def size_costs(model: PreTrainedModel, structure: Structure, bytes_of: Callable[[Mapping[str, Shape]], int]) -> Costs:
    """Bytes of the file of a pruned model."""
    return lambda counts: bytes_of(shapes_after(model, structure, counts))


def cache_bytes(model: PreTrainedModel, batch: int, context: int, dtype: torch.dtype) -> list[int]:
    """Bytes that each entry of the cache of a model holds after `context` tokens of `batch` sequences: what is
    computed on the meta device costs nothing, and every family says itself what it keeps."""
    (cache,) = (named := new_cache(model, model.config)).values()
    with torch.no_grad():
        tokens = torch.zeros(batch, context, dtype=torch.long, device="meta")
        model(tokens, use_cache=True, logits_to_keep=1, **named)
    held = [[part for part in vars(layer).values() if isinstance(part, torch.Tensor)] for layer in cache.layers]
    # Beside keys, values and states, some note how many tokens they have seen.
    return [sum(part.numel() * dtype.itemsize for part in own if part.is_floating_point()) for own in held]


def memory_costs(structure: Structure, size: Costs, caches: list[int]) -> Costs:
    """Bytes of the weights as they are in the file, and of the cache.

    Args:
        size: of the file.
        caches: bytes that each layer of the dense model keeps.
    """

    def costs(counts: Any) -> float:
        gone, cache = structure.removed_layers(counts), dict(enumerate(caches))
        for block, count in zip(structure.blocks, counts, strict=True):
            if block.kind == "heads":
                # Where single query heads are removed, all keys and values are kept.
                cache[block.layer] *= count / block.groups if block.strata == 1 else bool(count)
        return size(counts) + sum(own for layer, own in cache.items() if layer not in gone)

    return costs
