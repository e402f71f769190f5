"""Models of stock transformers classes, for layers of equal shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from adapruner.models import (
    Architecture,
    architecture_of,
    fields_by_layer,
    stock_fields,
    wrapper_of,
)

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
