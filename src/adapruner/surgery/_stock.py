"""Models that plain transformers builds: for layers that are alike, and for layers padded to be alike."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from adapruner.errors import AdaPrunerError
from adapruner.models import Architecture, architecture_of, is_pruned
from adapruner.structure import Block, Structure, TensorSlice, build_structure


def stock_models(architecture: Architecture, fields: Mapping[str, Any]) -> Iterator[PreTrainedModel]:
    """Models of a config that stock classes accept: of the family itself, then of one that computes the same under a
    config which takes any number of heads.

    Args:
        fields: of the config.
    """
    candidates = [(architecture.model_type, dict(fields))]
    equivalent = architecture.equivalent
    if equivalent and not any(fields.get(field) for field in equivalent.without):
        own = {name: value for name, value in fields.items() if name not in ("model_type", *equivalent.without)}
        candidates.append((equivalent.model_type, own | equivalent.fields))
    for model_type, own in candidates:
        stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        # Some families refuse numbers of heads that do not divide the hidden size, at one place or another.
        with contextlib.suppress(StrictDataclassError, ValueError):
            yield stock_class(stock_class.config_class.from_dict(own))


def fields_of_all(model: PreTrainedModel, architecture: Architecture) -> dict[str, Any]:
    """What a config says of the whole model: without what layers have less of, and without the code of others."""
    own = {"auto_map", "model_file", "architectures", "stock_per_layer_config", architecture.config_fields.head_numbers}
    fields = model.config.to_dict()
    kept = {name: value for name, value in fields.items() if name not in own | {"per_layer_config"}}
    of_stock = fields.get("stock_per_layer_config" if is_pruned(model.config) else "per_layer_config")
    return kept | ({"per_layer_config": of_stock} if of_stock else {})


def pad_to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """A model that computes the same as one whose layers differ, in a stock class: short layers are padded with heads
    and channels of zeros to the size of the widest, or of the dense model where the family takes no other.

    Every loader reads it; it is no faster than its widest layers.

    Raises:
        AdaPrunerError: see `check_paddable`.
    """
    if not is_pruned(model.config):
        return model
    check_paddable(model)
    padded: Any = _empty_padded(model)
    source, target = build_structure(model), build_structure(padded)
    state, shapes = model.state_dict(), {name: tensor.shape for name, tensor in padded.state_dict().items()}
    for block, wide in zip(source.blocks, target.blocks, strict=True):
        positions = _positions(model, block)
        for parameter, parts in block.slices_by_parameter.items():
            pairs = list(zip(parts, wide.slices_by_parameter[parameter], strict=True))
            state[parameter] = _spread(state[parameter], shapes[parameter], pairs, positions)
    padded.load_state_dict(state, assign=True)
    padded.tie_weights()
    padded.generation_config = model.generation_config
    moved: PreTrainedModel = padded.to(model.device).eval()
    return moved


def check_paddable(model: PreTrainedModel) -> None:
    """Raises AdaPrunerError if a model, which needs no weights for that, has biases that its family does not know."""
    if getattr(model.config, "added_biases", None):
        raise AdaPrunerError(
            f"the biases that compensation added have no place in a stock {model.config.model_type}: prune with"
            " `compensation` least-squares to export it"
        )


def _empty_padded(model: PreTrainedModel) -> PreTrainedModel:
    """Without weights."""
    architecture, structure = architecture_of(model.config), build_structure(model)
    # Without what each layer has less of, the config is that of the dense model.
    of_dense = fields_of_all(model, architecture)
    widest: dict[str, int] = {}
    for kind in ("heads", "experts", "channels"):
        blocks = [block for block in structure.blocks if block.kind == kind]
        most = max((block.groups for block in blocks), default=0)
        if kind == "experts" and any(block.groups != most for block in blocks):
            raise AdaPrunerError(
                "layers with different numbers of experts cannot be padded: a router would choose zeros"
            )
        for field in {field for block in blocks for field in block.config_counts}:
            widest[field] = most * max(block.config_counts[field] for block in blocks)
    # Experts cannot be padded, so their number is never that of the dense model.
    always = {architecture.experts.count} & widest.keys() if architecture.experts else set()
    of_dense |= {field: widest[field] for field in always}
    with init_empty_weights(include_buffers=False):
        for fields in (of_dense | widest, of_dense):
            for padded in stock_models(architecture, fields):
                # Some families take no number of heads or channels but their own, whatever their config says.
                with contextlib.suppress(AdaPrunerError):
                    widths = _widths(build_structure(padded))
                    if widths == _widths(structure) and padded.state_dict().keys() == model.state_dict().keys():
                        return padded
    raise AdaPrunerError(f"no stock {model.config.model_type} takes the layers of this model")


def _widths(structure: Structure) -> list[int]:
    """How wide a query head or channel of each block is."""
    projected = [block for block in structure.blocks if block.is_projected]
    return [block.row_wise.width // max(block.config_counts.values()) for block in projected]


def _positions(model: PreTrainedModel, block: Block) -> Tensor:
    """[groups], int64: which groups of the padded block those of a block become."""
    numbered = architecture_of(model.config).config_fields.head_numbers
    numbers = getattr(model.config.per_layer_config[block.layer], numbered, None) if numbered else None
    return torch.tensor(numbers if numbers and block.kind == "heads" else range(block.groups))


def _spread(
    tensor: Tensor, shape: torch.Size, pairs: list[tuple[TensorSlice, TensorSlice]], positions: Tensor
) -> Tensor:
    """A tensor of zeros, with the slices of the groups in their new places.

    Args:
        pairs: every slice of the tensor, and the one of the padded tensor that it becomes a part of.
    """
    axis = pairs[0][0].stored_axis
    new = torch.cat([_indices(wide.offset, wide.width, part.width, positions) for part, wide in pairs])
    groups = torch.arange(len(positions))
    old = torch.cat([_indices(part.offset, part.width, part.width, groups) for part, _ in pairs])
    padded = tensor.new_zeros(shape)
    padded.index_copy_(axis, new.to(tensor.device), tensor.index_select(axis, old.to(tensor.device)))
    is_norm = tensor.dim() == 1 and pairs[0][0].parameter.endswith(".weight")
    # The zeros count in the mean of the squares; what is left of a difference is the epsilon of the norm.
    return padded * math.sqrt(len(tensor) / len(padded)) if is_norm else padded


def _indices(offset: int, stride: int, width: int, groups: Tensor) -> Tensor:
    """[groups * width], int64: of every group the first `width` of its `stride` indices."""
    return (offset + groups[:, None] * stride + torch.arange(width)).flatten()
