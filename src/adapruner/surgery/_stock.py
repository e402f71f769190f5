"""Models of stock transformers classes, for layers of equal shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from adapruner.models._architecture import Architecture, architecture_of, stock_fields
from adapruner.models._wrapper import wrapper_of


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
