"""Models of stock transformers classes: for layers of equal shapes, and for layers padded to equal shapes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from adapruner.errors import AdaPrunerError
from adapruner.models import (
    Architecture,
    architecture_of,
    fields_by_layer,
    give_wrapper,
    is_pruned,
    stock_fields,
    wrapper_of,
)
from adapruner.structure import Block, Kind, Structure, TensorSlice, build_structure

# Config fields that list layers by number, and fields that count the first layers of another kind.
_LAYER_NUMBERS = ("full_attn_idxs", "hybrid_layer_ids", "mlp_only_layers", "moe_layers")
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")


def stock_models(model: PreTrainedModel, fields: Mapping[str, Any]) -> Iterator[PreTrainedModel]:
    """Models of a config in stock classes that accept it: the class of the family, then an equivalent one whose config
    accepts any number of heads. A multimodal model keeps the class of its decoder.

    Args:
        model: of the family.
        fields: of the config.
    """
    architecture = architecture_of(model.config)
    candidates = [(architecture.model_type, dict(fields))]
    equivalent = None if wrapper_of(model) else architecture.equivalent
    if equivalent and not any(fields.get(field) for field in equivalent.without):
        common = {name: value for name, value in fields.items() if name not in ("model_type", *equivalent.without)}
        candidates.append((equivalent.model_type, common | equivalent.fields))
    for model_type, accepted in candidates:
        stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        # Some families refuse numbers of heads that do not divide the hidden size, in the config or in the model.
        with contextlib.suppress(StrictDataclassError, ValueError):
            yield stock_class(stock_class.config_class.from_dict(accepted))


def fields_of_all(model: PreTrainedModel, architecture: Architecture) -> dict[str, Any]:
    """The config fields of the dense model: without the differences between pruned layers and without remote code."""
    numbers = architecture.config_fields.head_numbers
    return {name: value for name, value in stock_fields(model.config).items() if name != numbers}


def fields_of_layers(config: PreTrainedConfig, fields: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The fields of a config for some of the layers: lists with an entry for each layer are shortened, and layers are
    renumbered.

    Args:
        config: of the model with all layers.
        fields: the fields to adapt.
        kept: the numbers of the kept layers.
    """
    layers = config.num_hidden_layers
    if len(kept) == layers:
        return dict(fields)

    def shortened(name: str, value: Any) -> Any:
        if name in _LAYER_NUMBERS and value:
            return [new for new, old in enumerate(kept) if old in value]
        if name in _FIRST_LAYERS and value:
            return sum(old < value for old in kept)
        if name == "per_layer_config" and value:
            by_layer = fields_by_layer(value)
            return {new: by_layer.get(old, {}) for new, old in enumerate(kept)}
        has_layers = isinstance(value, list | tuple) and len(value) == layers and "token" not in name
        return [value[layer] for layer in kept] if has_layers else value

    adapted = {name: shortened(name, value) for name, value in fields.items()}
    return adapted | {config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): len(kept)}


def pad_to_stock(model: PreTrainedModel, fills_heads: bool = False) -> PreTrainedModel:
    """A model that computes the same as a pruned one, in a stock class and with heads that are together as wide as the
    hidden size: layers are padded with heads and channels of zeros, to the heads of the dense model and the channels of
    the widest layer, or to the channels of the dense model if the family supports no other number.

    Every loader reads it; it is no faster than its widest layers.

    Args:
        fills_heads: True to pad a model of a stock class as well, with heads up to the hidden size. Dense models of
            some families have fewer on purpose.

    Raises:
        AdaPrunerError: see `check_paddable`.
    """
    if is_pruned(model.config):
        check_paddable(model)
        return _padded(model, _empty_padded(model))
    padded = _empty_with_more_heads(model) if fills_heads else None
    return _padded(model, padded) if padded else model


def is_as_large_as_dense(padded: PreTrainedModel, model: PreTrainedModel) -> bool:
    """True if the layers of a pruned model differ and padding restored everything that was pruned inside them."""
    if not is_pruned(model.config):
        return False
    architecture = architecture_of(model.config)
    with init_empty_weights(include_buffers=False):
        dense = next(stock_models(model, fields_of_all(model, architecture)))
    return _shapes(padded) == _shapes(dense)


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _padded(model: PreTrainedModel, padded: Any) -> PreTrainedModel:
    """The larger model `padded`, which has no weights, with the weights of a smaller one and zeros."""
    target = {(block.layer, block.kind): block for block in _structure(padded).blocks}
    state, shapes = model.state_dict(), _shapes(padded)
    # Parts that a layer lacks become zeros.
    like: Tensor = next(iter(state.values()))
    state |= {name: like.new_zeros(shape) for name, shape in shapes.items() if name not in state}
    for block in _structure(model).blocks:
        wide, positions = target[block.layer, block.kind], _positions(model, block)
        for parameter, slices in block.slices_by_parameter.items():
            pairs = list(zip(slices, wide.slices_by_parameter[parameter], strict=True))
            state[parameter] = _spread(state[parameter], shapes[parameter], pairs, positions)
    padded.load_state_dict(state, assign=True)
    padded.tie_weights()
    padded.generation_config = model.generation_config
    give_wrapper(padded, wrapper_of(model))
    moved: PreTrainedModel = padded.to(model.device).eval()
    return moved


def check_paddable(model: PreTrainedModel) -> None:
    """Raises AdaPrunerError if a model, which needs no weights for that, has biases that its family does not have."""
    if getattr(model.config, "added_biases", None):
        raise AdaPrunerError(
            f"the biases that compensation added have no place in a stock {model.config.model_type}: prune with"
            " `compensation` least-squares to export it"
        )


def _empty_padded(model: PreTrainedModel) -> PreTrainedModel:
    """The padded model without weights."""
    architecture, structure = architecture_of(model.config), _structure(model)
    dense_fields = fields_of_all(model, architecture)
    if architecture.experts:
        # Experts cannot be padded, so their number is never that of the dense model.
        counts = {block.groups for block in build_structure(model).blocks if block.kind == "experts"}
        if len(counts) > 1:
            raise AdaPrunerError(
                "layers with different numbers of experts cannot be padded: a router would choose zeros"
            )
        if counts:
            dense_fields[architecture.experts.count] = counts.pop()
    widest: dict[str, int] = {}
    for block in (block for block in structure.blocks if block.kind != "heads"):
        for field, count in block.config_fields(block.groups).items():
            widest[field] = max(count, widest.get(field, 0))
    with init_empty_weights(include_buffers=False):
        for fields in (dense_fields | widest, dense_fields):
            for padded in stock_models(model, fields):
                # Some families ignore numbers of heads or channels in their config.
                with contextlib.suppress(AdaPrunerError):
                    wide, missing = _structure(padded), padded.state_dict().keys() ^ model.state_dict().keys()
                    if _widths(structure).items() <= _widths(wide).items() and _belong_to_removed_parts(
                        missing, architecture, structure, wide
                    ):
                        return padded
    raise AdaPrunerError(f"no stock {model.config.model_type} supports the layers of this model")


def _empty_with_more_heads(model: PreTrainedModel) -> PreTrainedModel | None:
    """A stock model without weights whose heads are together as wide as the hidden size, which loaders without a field
    for the width of a head need; None if they already are, or no number of heads gives that width."""
    architecture, structure = architecture_of(model.config), _structure(model)
    attention = [block for block in structure.blocks if block.kind == "heads"]
    counts = {tuple(sorted(block.config_fields(block.groups).items())) for block in attention}
    widths = {width for (_, kind), width in _widths(structure).items() if kind == "heads"}
    if len(counts) != 1 or len(widths) != 1:
        return None
    names, present = architecture.config_fields, dict(next(iter(counts)))
    wanted = model.config.hidden_size // max(widths)
    if model.config.hidden_size % max(widths) or present[names.heads] >= wanted:
        return None
    more = {names.heads: wanted}
    if names.key_value_heads:
        groups = present[names.key_value_heads]
        # Every group gets more query heads, or else there are more groups of the same size.
        if wanted % groups:
            groups, rest = divmod(groups * wanted, present[names.heads])
            if rest:
                return None
        more[names.key_value_heads] = groups
    with init_empty_weights(include_buffers=False):
        return next(stock_models(model, fields_of_all(model, architecture) | more), None)


def _structure(model: PreTrainedModel) -> Structure:
    """The structure with channels inside experts if they can be cut, because whole experts cannot be padded."""
    experts = architecture_of(model.config).experts
    return build_structure(model, experts="channel" if experts and experts.channels else "expert")


def _widths(structure: Structure) -> dict[tuple[int, Kind], int]:
    """The width of a query head or channel of each block, by layer and kind."""
    projected = [block for block in structure.blocks if block.is_projected]
    return {(block.layer, block.kind): block.row_wise.width // max(block.config_counts.values()) for block in projected}


def _belong_to_removed_parts(
    names: Collection[str], architecture: Architecture, structure: Structure, wide: Structure
) -> bool:
    """True if all tensors belong to attention or feed-forward modules that their layer lacks."""
    removed = _widths(wide).keys() - _widths(structure).keys()
    paths = tuple(f"{architecture.layers}.{layer}.{architecture.module_of(kind)}." for layer, kind in removed)
    return all(name.startswith(paths) for name in names)


def _positions(model: PreTrainedModel, block: Block) -> Tensor:
    """[groups], int64: the numbers of the groups of a block in the padded block; within an expert if each expert has
    groups."""
    numbered = architecture_of(model.config).config_fields.head_numbers
    numbers = getattr(model.config.per_layer_config[block.layer], numbered, None) if numbered else None
    same = range(block.groups // (block.experts or 1))
    return torch.tensor(numbers if numbers and block.kind == "heads" else same)


def _spread(
    tensor: Tensor, shape: torch.Size, pairs: list[tuple[TensorSlice, TensorSlice]], positions: Tensor
) -> Tensor:
    """A tensor of zeros, with the slices of the groups in their new places.

    Args:
        pairs: every slice of the tensor with the slice of the padded tensor that contains it.
    """
    axis = pairs[0][0].stored_axis + bool(pairs[0][0].experts)
    new = torch.cat([_indices(wide.offset, wide.width, narrow.width, positions) for narrow, wide in pairs])
    groups = torch.arange(len(positions))
    old = torch.cat([_indices(narrow.offset, narrow.width, narrow.width, groups) for narrow, _ in pairs])
    padded = tensor.new_zeros(shape)
    padded.index_copy_(axis, new.to(tensor.device), tensor.index_select(axis, old.to(tensor.device)))
    is_norm = tensor.dim() == 1 and pairs[0][0].parameter.endswith(".weight")
    # Zeros lower the mean of the squares; up to the epsilon of the norm, the factor corrects for that.
    return padded * math.sqrt(len(tensor) / len(padded)) if is_norm else padded


def _indices(offset: int, stride: int, width: int, groups: Tensor) -> Tensor:
    """[groups * width], int64: the first `width` of the `stride` indices of every group."""
    return (offset + groups[:, None] * stride + torch.arange(width)).flatten()
