"""A maximum size or memory of the pruned model, turned into a ratio before a run begins."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from adapruner.config import PruneConfig, SizeLimit
from adapruner.errors import AdaPrunerError
from adapruner.evaluation._speed import new_cache
from adapruner.families import open_config
from adapruner.gguf._size import least_bytes_of_weight
from adapruner.gguf._write import gguf_bytes
from adapruner.memory import dtype_of_weights
from adapruner.models._config import find_wrapper
from adapruner.models._loading import empty_model, load_tokenizer
from adapruner.models._places import find_model
from adapruner.option_values import size_in_bytes
from adapruner.planning._budget import RATIO_TOLERANCE, BudgetError, UnreachableRatioError, reference_budget
from adapruner.structure._blocks import count_parameters
from adapruner.structure._build import build_structure

# As safetensors writes their names.
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def ratio_within(limit: SizeLimit, config: PruneConfig) -> float:
    """The lowest ratio at which every plan that a run may choose gives a model of at most a size or memory.

    Plans at a ratio differ in which blocks they cut, and in up to `RATIO_TOLERANCE` in the parameters that they remove.
    So it is counted on from the largest model, unpruned: every parameter that is removed saves at least the bytes of a
    weight in the smallest type of the file. The KV cache is counted as of the dense model, whose heads may all be kept.

    Args:
        config: the other options of the run; its ratio does not count.

    Raises:
        AdaPrunerError: the dense model is small enough already, or no ratio is high enough; with the numbers.
    """
    if config.ratio_of == "groups":
        raise AdaPrunerError("`ratio_of` groups needs a ratio: leave `size`, `memory` or `ratio_of` out")
    location = find_model(config.model)
    given_config, wrapper = open_config(location), find_wrapper(location)
    empty = empty_model(given_config)
    whole = wrapper.around(given_config) if wrapper else empty
    structure = build_structure(empty, config.head_granularity, config.expert_granularity)
    dtype = dtype_of_weights(empty, config.dtype)
    if limit.gguf_type is None:
        bytes_of_weight, dense = float(dtype.itemsize), safetensors_bytes(whole, dtype)
    else:
        bytes_of_weight = least_bytes_of_weight(limit.gguf_type)
        dense = gguf_bytes(empty, load_tokenizer(location), limit.gguf_type, config.round_to)
        dtype = torch.float16  # of the cache in llama.cpp
    option = "size" if limit.memory is None else "memory"
    if limit.memory is not None:
        dense += cache_bytes(empty, limit.batch, limit.context, dtype)
    asked = str(getattr(limit, option))

    def has_plan(ratio: float) -> bool:
        """False between steps of whole heads and experts."""
        try:
            reference_budget(config, structure, ratio)
        except UnreachableRatioError:
            raise
        except BudgetError:
            return False
        return True

    excess = dense - size_in_bytes(asked)
    if excess <= 0:
        raise AdaPrunerError(f"`{option}` {asked}: the model has {_shown(dense)} already")
    ratio = excess / bytes_of_weight / structure.total_parameters + RATIO_TOLERANCE
    try:
        while not has_plan(ratio):
            ratio += RATIO_TOLERANCE / 2
    except UnreachableRatioError:
        best = _highest(has_plan, ratio)
        removed = max(0.0, best - RATIO_TOLERANCE) * structure.total_parameters
        raise AdaPrunerError(
            f"`{option}` {asked} cannot be met: at best {_shown(dense - removed * bytes_of_weight)}, with {best:.1%} of"
            f" the parameters removed; the dense model has {_shown(dense)}"
        ) from None
    share = structure.total_parameters / count_parameters(whole) if config.ratio_of == "parameters" else 1.0
    return math.ceil(1e5 * ratio * share) / 1e5


def _highest(has_plan: Callable[[float], bool], too_high: float) -> float:
    """The highest ratio found by bisection that has a plan; 0 if there is none."""
    best, low, high = 0.0, 0.0, too_high
    for _ in range(12):
        middle = (low + high) / 2
        try:
            if has_plan(middle):
                best = middle
            low = middle
        except UnreachableRatioError:
            high = middle
    return best


def _shown(size: float) -> str:
    """Bytes as text, rounded up."""
    return f"{math.ceil(size / 1e4) / 100:,.2f} MB"


def safetensors_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of a model, which may be on the meta device, as one safetensors file. If it is split into several, their
    headers add some hundred bytes."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    stored = parameters | {name: tensor for name, tensor in model.state_dict().items() if name in buffers}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(stored.items()):
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": tuple(tensor.shape), "data_offsets": [start, end]}
    return 8 + 8 * math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) + end


def cache_bytes(model: PreTrainedModel, batch: int, context: int, dtype: torch.dtype) -> int:
    """Bytes of the cache after `context` tokens of `batch` sequences. The model is run on the meta device, which costs
    nothing and covers every kind of cache."""
    (cache,) = (named := new_cache(model, model.config)).values()
    with torch.no_grad():
        tokens = torch.zeros(batch, context, dtype=torch.long, device="meta")
        model(tokens, use_cache=True, logits_to_keep=1, **named)
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    # Integers are counts of tokens; keys, values and states are not.
    return sum(state.numel() * dtype.itemsize for state in held if state.is_floating_point())
