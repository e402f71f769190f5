"""A family of models as data, read from `architectures/*.yaml` or a user's files, and the families known so far."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from adapruner.base.errors import AdaPrunerError, first_problem, reason
from adapruner.base.files import parse_yaml
from adapruner.remote_code.modeling_pruned import ATTENTION as ATTENTION, Family, register_family, without_layers

# The output of rows of a projection: all query heads, all key heads, all value heads; query, key and value of one head
# after the other (only if every head has its own key and value); feed-forward channels.
RowKind = Literal["query", "key", "value", "query-key-value", "channels"]


class ProjectionNames(BaseModel, extra="forbid", frozen=True):
    """Paths, relative to a layer, of the projections that compute the groups of a block and the one that reads them.

    Attributes:
        inputs: for each projection (or norm over all of its outputs, or single parameter), the kinds of its rows, in
            order.
        output: the projection that reads the groups.
        returned: number of values that the module around the projections returns, the first of which is its output; 0
            if it returns a single tensor.
        normalized: a norm follows before the output is added to the hidden state.
    """

    inputs: dict[str, tuple[RowKind, ...]]
    output: str
    returned: int = 0
    normalized: bool = False

    @property
    def module(self) -> str:
        """Path of the module around all projections; empty if that is the layer."""
        paths = [path.split(".")[:-1] for path in (*self.inputs, self.output)]
        levels = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
        return ".".join(names[0] for names in levels)


class ExpertChannels(BaseModel, extra="forbid", frozen=True):
    """The channels inside each expert; paths are relative to a layer, of parameters with one part for every expert.

    Attributes:
        inputs: for each parameter that computes channels, the width of a channel in each pass over all channels:
            `[1, 1]` for gates first and then ups, `[2]` if each gate is followed by its up.
        output: the parameter that reads the channels.
        axes: for each of these parameters, the axis of the channels.
        count: config field for the number of channels.
    """

    inputs: dict[str, tuple[int, ...]]
    output: str
    axes: dict[str, int]
    count: str


class ExpertNames(BaseModel, extra="forbid", frozen=True):
    """The experts of a layer.

    Attributes:
        tensors: paths, relative to a layer, of the parameters and buffers that have a part for every expert (weights,
            rows of the router, corrections), with the axis of the experts.
        count: config field for the number of experts.
        top_k: config field for the number of experts per token.
        groups: config field for the number of groups of experts, the best of which are chosen first.
        chosen_groups: config field for the number of chosen groups.
        channels: the channels inside each expert; None if they cannot be pruned.
    """

    tensors: dict[str, int]
    count: str
    top_k: str | None = None
    groups: str | None = None
    chosen_groups: str | None = None
    channels: ExpertChannels | None = None


class ConfigFields(BaseModel, extra="forbid", frozen=True):
    """Names of the `PreTrainedConfig` fields that count heads and channels.

    Attributes:
        key_value_heads: None if every query head has its own key and value.
        head_numbers: field for the numbers of the kept heads, if position biases differ by head (alibi).
    """

    heads: str = "num_attention_heads"
    key_value_heads: str | None = None
    head_dim: str = "head_dim"
    channels: str = "intermediate_size"
    head_numbers: str | None = None


class Equivalent(BaseModel, extra="forbid", frozen=True):
    """Another family that computes the same.

    Attributes:
        fields: values of its config fields that the first family lacks.
        without: fields of the first family that must be off, as the other family lacks them.
    """

    model_type: str
    fields: dict[str, object] = {}
    without: tuple[str, ...] = ()


class Architecture(BaseModel, extra="forbid", frozen=True):
    """A model family as data: the paths of its layers and projections, and the config fields that count them.

    Attributes:
        default_channels: channels as a multiple of the hidden size, if the config leaves their number open.
        learned_positions: each position has a learned embedding, so that texts cannot be longer.
        equivalent: family whose config accepts numbers of heads that this one refuses.
        unsupported: config fields, with the value for which a model is built differently from this description.
        fixed_attention_width: attention is always as wide as the hidden size, so that the config alone cannot build
            one with fewer heads.
        fixed_channels: the config has no field for the number of channels.
        layouts: the layouts that pruned models can have.
        removable_attention: the attention of a layer can be removed whole.
    """

    model_type: str
    layers: str
    attention: ProjectionNames | None = None
    feed_forward: ProjectionNames | None = None
    experts: ExpertNames | None = None
    config_fields: ConfigFields
    default_channels: int | None = None
    learned_positions: bool = False
    equivalent: Equivalent | None = None
    unsupported: dict[str, bool] = {}
    fixed_attention_width: bool = False
    fixed_channels: bool = False
    layouts: tuple[Literal["per-layer", "uniform"], ...] = ("per-layer", "uniform")
    removable_attention: bool = True

    def changed(self, **fields: object) -> Architecture:
        """A copy with other fields; unlike `model_copy`, without the cached classes."""
        return Architecture(**{name: getattr(self, name) for name in Architecture.model_fields} | fields)

    @cached_property
    def pruned_class(self) -> Any:
        """The class of causal language models of this family whose layers differ."""
        attention, channels = self.attention, self.feed_forward
        family = Family(
            model_type=self.model_type,
            layers=self.layers,
            attention_output=attention.output if attention and self.fixed_attention_width else None,
            feed_forward=(*channels.inputs, channels.output) if channels and self.fixed_channels else (),
            channels=self.config_fields.channels,
            attention=attention.module if attention else None,
            returned=attention.returned if attention else 0,
        )
        return register_family(family)

    @property
    def layer_fields(self) -> set[str | None]:
        """The config fields in which layers may differ."""
        names, experts = self.config_fields, self.experts
        fields = {names.heads, names.key_value_heads, names.head_dim, names.channels, names.head_numbers}
        fields |= {experts.count} if experts else set()
        return fields | ({experts.channels.count} if experts and experts.channels else set())

    def head_dim(self, config: PreTrainedConfig) -> int:
        """Width of one attention head; in families without the field, the hidden size divided by the heads."""
        explicit = getattr(config, self.config_fields.head_dim, None)
        return int(explicit or config.hidden_size // getattr(config, self.config_fields.heads))

    def cached(self, config: PreTrainedConfig) -> int:
        """Numbers that are kept of a token for the next ones, at most: its keys and values in all layers."""
        if self.attention is None:
            return int(2 * config.num_hidden_layers * config.hidden_size)
        names = self.config_fields
        heads = getattr(config, names.key_value_heads or names.heads, None) or getattr(config, names.heads)
        return int(2 * config.num_hidden_layers * heads * self.head_dim(config))

    def channels(self, config: PreTrainedConfig) -> int:
        """Feed-forward width of a layer."""
        explicit = getattr(config, self.config_fields.channels, None)
        return int((self.default_channels or 0) * config.hidden_size if explicit is None else explicit)


# Of this process, by `model_type`: families of the user's files; inferred ones, or the reason why one cannot be pruned.
_registered: dict[str, Architecture] = {}
_inferred: dict[str, Architecture | str] = {}


@cache
def _shipped() -> dict[str, Architecture]:
    folder = resources.files("adapruner.model") / "architectures"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    families = [Architecture.model_validate(parse_yaml(file.read_text(encoding="utf-8"))) for file in files]
    return {family.model_type: family for family in families}


def known_architectures() -> dict[str, Architecture]:
    """The families that a file describes, by `model_type`: the shipped and the registered ones."""
    return _shipped() | _registered


def register_architectures(path: Path) -> list[str]:
    """Adds families to the shipped ones, for this process.

    Args:
        path: a YAML file with the fields of `Architecture`, or a folder of such files.

    Returns:
        The `model_type` of every family in them.

    Raises:
        AdaPrunerError: a file is invalid, or describes a family that is shipped or that transformers does not have.
    """
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files:
        raise AdaPrunerError(f"{path} has no .yaml file that describes a family")
    model_types = []
    for file in files:
        try:
            family = Architecture.model_validate(parse_yaml(file.read_text(encoding="utf-8")))
        except ValidationError as error:
            raise AdaPrunerError(f"{file} describes no family: {first_problem(error)}") from None
        except (OSError, ValueError) as error:
            raise AdaPrunerError(f"{file} cannot be read: {reason(error)}") from None
        if known_architectures().get(family.model_type, family) != family:
            raise AdaPrunerError(f"{file}: there is another description of {family.model_type!r} already")
        if not has_causal_model(family.model_type):
            raise AdaPrunerError(f"{file}: transformers has no causal language model {family.model_type!r}")
        _registered[family.model_type] = family
        model_types.append(family.model_type)
    return model_types


def has_causal_model(model_type: str) -> bool:
    """True if transformers has a causal language model of a family, or the decoder of a multimodal model was opened."""
    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING


def remember_family(model_type: str, answer: Architecture | str) -> None:
    """Remembers, for this process, the architecture of a family without a file, or the reason why it cannot be pruned
    (see `families.learn`)."""
    _inferred[model_type] = answer


def family_named(model_type: str) -> Architecture | None:
    """The architecture of a known family; None for others."""
    answer = _answer(model_type)
    return answer if isinstance(answer, Architecture) else None


def _answer(model_type: str) -> Architecture | str | None:
    return _registered.get(model_type) or _shipped().get(model_type) or _inferred.get(model_type)


@contextlib.contextmanager
def using_architecture(architecture: Architecture) -> Iterator[None]:
    """While it lasts, a family has this architecture."""
    before = dict(_registered)
    _registered[architecture.model_type] = architecture
    try:
        yield
    finally:
        _registered.clear()
        _registered.update(before)


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture of a model of a known family, from its config; nothing is inferred."""
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        raise AdaPrunerError(
            f"this model is quantized ({quantization}); prune the unquantized checkpoint, or one in FP8 with scales for"
            " blocks of 128 × 128, and quantize the result"
        )
    architecture = _answer(config.model_type) or _why_unknown(config)
    if isinstance(architecture, str):
        raise AdaPrunerError(architecture)
    for field, value in architecture.unsupported.items():
        if getattr(config, field, None) == value:
            raise AdaPrunerError(f"models of the family {config.model_type} with {field}: {value} cannot be pruned yet")
    return architecture


def _why_unknown(config: PreTrainedConfig) -> str:
    if config.is_encoder_decoder:
        return f"{config.model_type!r} is an encoder-decoder, only causal language models can be pruned"
    if config.get_text_config() is not config:
        return f"a {config.model_type} in memory has other models besides its decoder: save it, and give the folder"
    if has_causal_model(config.model_type):
        return (
            f"no file describes the family {config.model_type!r}, and it was not inferred: call"
            " adapruner.families.resolve with the config of the model first"
        )
    close = difflib.get_close_matches(config.model_type, known_architectures(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"transformers has no causal language model {config.model_type!r}{hint}"


def is_pruned(config: PreTrainedConfig) -> bool:
    """True for the config of a model whose layers differ, of a class that this package made."""
    return hasattr(config, "stock_class")


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config itself; for a pruned model, the config of the dense model that it was made from."""
    if not is_pruned(config):
        return config
    fields = {name: value for name, value in stock_fields(config).items() if name != "model_type"}
    return CONFIG_MAPPING[config.model_type].from_dict(fields)


def stock_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config without remote code; for a pruned model, with the layers of the dense model."""
    fields = without_layers(config.to_dict()) if is_pruned(config) else config.to_dict()
    omitted = {"auto_map", "model_file", "architectures", "allow_global_per_layer_attribute_access"}
    omitted |= set() if fields.get("per_layer_config") else {"per_layer_config"}
    return {name: value for name, value in fields.items() if name not in omitted}


def lacks_attention(layer_config: PreTrainedConfig) -> bool:
    """True if the attention of a layer was removed whole."""
    return ATTENTION in getattr(layer_config, "skip", ())


def fields_by_layer(per_layer_config: Mapping[Any, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The fields that a config sets for single layers, by the number of the layer.

    In JSON and after `to_dict`, the numbers are strings, which transformers pads with zeros: "04" if a layer after the
    tenth differs.
    """
    return {int(layer): fields for layer, fields in per_layer_config.items()}


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a config, with random weights of transformers; meant for devices on which they cost nothing."""
    make = architecture_of(config).pruned_class if is_pruned(config) else AutoModelForCausalLM.from_config
    return cast(PreTrainedModel, make(config))


def check_length(config: PreTrainedConfig, length: int) -> str | None:
    """A warning for texts longer than `max_position_embeddings`; None for shorter ones."""
    longest = getattr(config, "max_position_embeddings", None)
    if not longest or length <= longest:
        return None
    known = family_named(config.model_type)
    is_dynamic = (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    if is_dynamic or (known and known.learned_positions):
        why = "and dynamic rotary embeddings, which remember longer texts" if is_dynamic else "and no more"
        raise AdaPrunerError(
            f"this {config.model_type} has {longest:,} positions {why}; texts of {length:,} tokens are too long"
        )
    return f"texts of {length:,} tokens exceed the {longest:,} positions of this model: expect worse results"


def check_tokens(config: PreTrainedConfig, largest: int) -> None:
    """Raises AdaPrunerError if a model has no embedding for the largest token of a text."""
    if largest >= config.vocab_size:
        raise AdaPrunerError(
            f"the text has token {largest}, the embedding of the model ends at {config.vocab_size - 1}: its tokenizer"
            " has tokens that it was not trained with, take them out of the text or out of the tokenizer"
        )


def check_windows(windows: Tensor, name: str, model: PreTrainedModel | None = None) -> None:
    """Refuses a tensor that holds no windows of tokens, or tokens that a model does not have; and a model that is in
    training mode."""
    if windows.dtype != torch.int64 or windows.dim() != 2 or not len(windows) or windows.shape[1] < 2:
        raise AdaPrunerError(
            f"`{name}` is a tensor of {windows.dtype} and shape {list(windows.shape)}: windows are tokens, int64, of"
            " shape [windows, tokens], at least two tokens each"
        )
    if (least := int(windows.min())) < 0:
        raise AdaPrunerError(f"`{name}` holds {least}, which is not a token")
    if model:
        check_tokens(model.config, int(windows.max()))
        if any(module.training for module in model.modules()):
            raise AdaPrunerError("the model is in training mode, in which dropout is random: call its eval()")
