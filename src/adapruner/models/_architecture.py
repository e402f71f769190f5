"""What must be known of a model family to prune it, read from `architectures/*.yaml`."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import resources
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedConfig

from adapruner.errors import AdaPrunerError


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AttentionNames(_Data):
    """Module paths of the attention projections, relative to a layer."""

    query: str
    key: str
    value: str
    output: str


class FeedForwardNames(_Data):
    """Module paths of the feed-forward projections, relative to a layer."""

    gate: str
    up: str
    down: str


class ConfigFields(_Data):
    """Names of the `PreTrainedConfig` fields that count what is pruned."""

    heads: str
    key_value_heads: str
    head_dim: str
    channels: str


class Architecture(_Data):
    """A model family as data: where its layers and projections are and which config fields count them."""

    model_type: str
    layers: str
    attention: AttentionNames
    feed_forward: FeedForwardNames
    config_fields: ConfigFields

    def head_dim(self, config: PreTrainedConfig) -> int:
        """Width of one attention head; families without the field divide the hidden size by the heads."""
        explicit = getattr(config, self.config_fields.head_dim, None)
        return int(explicit or config.hidden_size // getattr(config, self.config_fields.heads))


@cache
def known_architectures() -> dict[str, Architecture]:
    """All families shipped with the package, by `model_type`."""
    folder = resources.files("adapruner.models") / "architectures"
    families = (
        Architecture.model_validate(yaml.safe_load(file.read_text()))
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    )
    return {family.model_type: family for family in families}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture of a model from its config.

    Raises:
        AdaPrunerError: the family is not known, or the model is quantized.
    """
    known = known_architectures()
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is not None:
        raise AdaPrunerError(
            f"this model is quantized ({quantization}); prune the unquantized checkpoint and quantize the result"
        )
    if config.model_type not in known:
        close = difflib.get_close_matches(config.model_type, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise AdaPrunerError(
            f"unknown architecture {config.model_type!r}; known are {', '.join(known)}.{hint}"
            " A new family is one YAML file in adapruner/models/architectures"
        )
    return known[config.model_type]
