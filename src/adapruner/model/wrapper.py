"""The decoder inside a multimodal model: opened as a causal language model, and written back among all other parts."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_MAPPING,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import FEATURE_EXTRACTOR_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME
from transformers.utils.hub import cached_file

from adapruner.base.errors import AdaPrunerError
from adapruner.model.architecture import architecture_of, is_pruned, new_model
from adapruner.model.layers import without_weights
from adapruner.model.stored import StoredTensor, is_of_multi_token_head, read_tensors, stored_tensors
from adapruner.remote_code.modeling_pruned import Wrapper as WrapperNames, pruned_config_class, register_wrapper

_ATTRIBUTE = "multimodal_wrapper"
# They are copied; in older models, the template of chats is not that of the tokenizer.
_PROCESSOR_FILES = {PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME}
_PROCESSOR_FILES |= {"chat_template.json"}


class _Causal:
    """Mixin: a decoder with a linear head, for decoders that have no causal language model of their own."""

    base_model_prefix = "model"
    config: object
    decoder_class: Any

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # of PreTrainedModel
        self.model = self.decoder_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: object,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **options,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Newer versions of transformers have another name for it.
        cache = next(({name: outputs[name]} for name in ("cache", "past_key_values") if name in outputs), {})
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        # Steps after the head, which multimodal models do by these fields; `prove_around` compares.
        multiplier, divisor, cap = (
            getattr(self.config, name, None)
            for name in ("output_multiplier", "logits_scaling", "final_logit_softcapping")
        )
        logits = logits * (multiplier or 1) / (divisor or 1)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return CausalLMOutputWithPast(logits=logits, **cache)


@dataclass(frozen=True)
class Wrapper:
    """A multimodal model in files.

    Attributes:
        path: folder or hub id.
        config: its config; for a pruned model, with the dense decoder inside.
        text: name of the decoder's config in it.
    """

    path: str
    config: PreTrainedConfig
    text: str

    def around(self, decoder: PreTrainedConfig, dtype: torch.dtype | None = None) -> Any:
        """The multimodal model without weights, around a decoder of a config."""
        return _empty(*self.class_and_config(decoder), dtype)

    def class_and_config(self, decoder: PreTrainedConfig) -> tuple[object, PreTrainedConfig]:
        """The class and the config of the multimodal model around a decoder of a config."""
        stock = copy.deepcopy(self.config)
        if hasattr(decoder, "tie_word_embeddings"):
            stock.tie_word_embeddings = decoder.tie_word_embeddings
        if not is_pruned(decoder):
            setattr(stock, self.text, copy.deepcopy(decoder))
            return _model_class(stock), stock
        with torch.device("meta"):
            dense = new_model(getattr(self.config, self.text))
        family = architecture_of(decoder).pruned_class.family
        layers = dict(_renamed([family.layers], dense, self._dense()))[family.layers]
        made = register_wrapper(family, WrapperNames(stock.model_type, self.text, layers))
        fields = stock.to_dict() | {self.text: decoder.to_dict()}
        return made, cast(type[PreTrainedConfig], made.config_class).from_dict(fields)

    def holding(self, model: PreTrainedModel) -> Any:
        """The multimodal model around a decoder with the weights of one; in the other parts, no weight is a number."""
        whole = self.around(model.config)
        state, names = model.state_dict(), self.names(model, whole)
        whole.load_state_dict({names[name]: tensor for name, tensor in state.items()}, strict=False, assign=True)
        whole.tie_weights()
        for module in whole.modules():
            for name, weight in module._parameters.items():
                if weight is not None and weight.is_meta:
                    nothing = torch.full((), torch.nan, dtype=weight.dtype).expand(weight.shape)  # takes no memory
                    module._parameters[name] = nn.Parameter(nothing, requires_grad=False)
        return whole.eval()

    def fits(self, decoder: PreTrainedConfig) -> bool:
        """True if the other parts have the same shapes around a decoder of a config: some read sizes of the decoder."""
        shapes = []
        for inner in (decoder, getattr(self.config, self.text)):
            whole = self.around(inner)
            with torch.device("meta"):
                inside = {*self.names(new_model(inner), whole).values()}
            shapes.append({name: tensor.shape for name, tensor in whole.state_dict().items() if name not in inside})
        return shapes[0] == shapes[1]

    def with_decoder(self, decoder: PreTrainedConfig) -> Wrapper:
        """The same with another dense decoder inside."""
        config = copy.deepcopy(self.config)
        setattr(config, self.text, copy.deepcopy(decoder))
        for name in {"vocab_size", "hidden_size"} & vars(config).keys():
            setattr(config, name, getattr(decoder, name))
        return replace(self, config=config)

    def _dense(self) -> Any:
        return _empty(_model_class(self.config), copy.deepcopy(self.config))

    def names(self, model: PreTrainedModel, whole: PreTrainedModel) -> dict[str, str]:
        """The names of tensors in the multimodal model, by their names in its decoder; refuses a decoder with tensors
        that the multimodal model lacks."""
        state = whole.state_dict()
        names = dict(_renamed(model.state_dict(), model, whole))
        for name, tensor in model.state_dict().items():
            if names[name] not in state or state[names[name]].shape != tensor.shape:
                raise AdaPrunerError(f"a {self.config.model_type} has no {name} like its decoder alone")
        return names

    def stored(self, decoder: PreTrainedConfig, local_files_only: bool = False) -> dict[str, StoredTensor]:
        """The tensors of the decoder in the files, by their names in the causal language model."""
        return self._split(decoder, local_files_only)[0]

    def other_tensors(self) -> dict[str, Tensor]:
        """The tensors of all other parts but multi-token prediction heads as they are in the files, by their names
        there."""
        others = self._split(getattr(self.config, self.text), False)[1]
        return read_tensors({name: name for name in others}, others)

    def save(self, model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path, shard_size: str) -> None:
        """Writes the multimodal model around a decoder: its config, generation config and code, the weights of the
        decoder by their names in the causal language model, and the files of processors; all but the other tensors."""
        whole = self.around(model.config, model.dtype)
        whole.generation_config = model.generation_config
        names = self.names(model, whole)
        renamed = {names[name]: tensor for name, tensor in state.items()}
        whole.save_pretrained(folder, max_shard_size=shard_size, state_dict=renamed)
        for file in self._processor_files():
            shutil.copyfile(file, folder / Path(file).name)

    def _processor_files(self) -> list[str]:
        """Those that the model has; fetched with its weights, hours before they are saved."""
        files = (cached_file(self.path, name, _raise_exceptions_for_missing_entries=False) for name in _PROCESSOR_FILES)
        return [file for file in files if file]

    def _split(
        self, decoder: PreTrainedConfig, local_files_only: bool
    ) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
        whole = self.around(decoder)
        with torch.device("meta"):
            model = new_model(decoder)
        names = {name: inner for inner, name in self.names(model, whole).items()}
        conversions, state = get_model_conversion_mapping(whole), whole.state_dict()
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        inside, others = dict[str, StoredTensor](), dict[str, StoredTensor]()
        for key, tensor in stored_tensors(self.path, self.config, local_files_only).items():
            name, _ = rename_source_key(key, renamings, converters, whole.base_model_prefix, state)
            if name in names:
                inside[names[name]] = tensor
            elif name in state or not is_of_multi_token_head(key, decoder):
                others[key] = tensor
        if not local_files_only:
            self._processor_files()
        return inside, others


def find_text(config: PreTrainedConfig) -> str | None:
    """The name of the decoder's config in a multimodal config; None for the config of a text model."""
    if config.is_encoder_decoder:
        return None
    text = config.get_text_config(decoder=True)
    if text is config:
        return None
    names = [name for name, value in vars(config).items() if value is text]
    if not names or type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        raise AdaPrunerError(
            f"a {config.model_type} has other models besides a text model, and transformers cannot prompt it with text"
            " alone: save its text model, and prune that"
        )
    return names[0]


def decoder_config(wrapper: Wrapper, pruned: Mapping[str, object] | None) -> PreTrainedConfig:
    """The config of the decoder inside a multimodal model, whose causal language model is known to transformers from
    then on; `pruned` has the fields of the decoder if its layers differ."""
    dense: PreTrainedConfig = getattr(wrapper.config, wrapper.text)
    whole = wrapper._dense()
    decoder = _inner_decoder(whole)
    if type(dense) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        _register(type(dense), decoder, wrapper.config)
    text = copy.deepcopy(dense) if pruned is None else pruned_config_class(dense.model_type).from_dict(dict(pruned))
    output = _path(whole, _output_layer(whole))
    text.tie_word_embeddings = f"{output}.weight" in whole.all_tied_weights_keys
    text.dtype = text.dtype or wrapper.config.dtype
    if quantization := getattr(wrapper.config, "quantization_config", None):
        text.quantization_config = quantization
    return text


def decoder_alone(whole: PreTrainedModel, wrapper: Wrapper, config: PreTrainedConfig) -> PreTrainedModel:
    """The decoder of a loaded multimodal model, with this config, as a causal language model with the same weights."""
    with without_weights():
        model = new_model(config)
    state = whole.state_dict()
    model.load_state_dict({name: state[key] for name, key in wrapper.names(model, whole).items()}, assign=True)
    model.tie_weights()
    model.config.dtype = whole.dtype
    model.generation_config = whole.generation_config
    model.eval()
    return model


def wrapper_of(model: PreTrainedModel) -> Wrapper | None:
    """The multimodal model around a decoder; None for a text model, or one that was not loaded from files."""
    return getattr(model, _ATTRIBUTE, None)


def give_wrapper(model: PreTrainedModel, wrapper: Wrapper | None) -> None:
    """Makes a multimodal model that of a decoder, with which it is saved."""
    setattr(model, _ATTRIBUTE, wrapper)


def _model_class(config: PreTrainedConfig) -> object:
    return MODEL_FOR_MULTIMODAL_LM_MAPPING[CONFIG_MAPPING[config.model_type]]


def _empty(model_class: Any, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> Any:
    with without_weights():
        model = model_class._from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def _inner_decoder(model: Any) -> Any:
    """The decoder without its head."""
    while (inner := model.get_decoder()) is not model:
        model = inner
    return model


def _output_layer(model: Any) -> nn.Module | None:
    """The head of a multimodal model, or of the causal language model inside."""
    while model.get_output_embeddings() is None and (inner := model.get_decoder()) is not model:
        model = inner
    return cast(nn.Module | None, model.get_output_embeddings())


def _path(model: PreTrainedModel, module: nn.Module | None) -> str:
    """The path of a module in a model."""
    for path, other in model.named_modules():
        if other is module:
            return str(path)
    raise AdaPrunerError(f"a {model.config.model_type} has no decoder with an output layer")


def _renamed(names: Iterable[str], model: PreTrainedModel, whole: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Names in a causal language model with those in the multimodal model: below the decoder, or in the head."""
    decoders = _path(model, _inner_decoder(model)), _path(whole, _inner_decoder(whole))
    heads = _path(model, model.get_output_embeddings()), _path(whole, _output_layer(whole))
    prefixes = [[f"{path}.".removeprefix(".") for path in paths] for paths in (decoders, heads)]
    for name in names:
        inner, outer = next((pair for pair in prefixes if name.startswith(pair[0])), ("", ""))
        yield name, outer + name.removeprefix(inner)


def _register(config_class: type[PreTrainedConfig], decoder: object, whole: PreTrainedConfig) -> None:
    """Makes a causal language model of a decoder that has none, and tells transformers."""
    decoder_class = type(decoder)
    if not isinstance(decoder, PreTrainedModel):
        raise AdaPrunerError(f"the decoder of a {whole.model_type} is no model of its own: it cannot be pruned")
    base = next(base for base in decoder_class.__mro__[1:] if issubclass(base, PreTrainedModel))
    embedding = f"model.{_path(decoder, decoder.get_input_embeddings())}.weight"
    members = {"__module__": __name__, "decoder_class": decoder_class, "config_class": config_class}
    members |= {"_tied_weights_keys": {"lm_head.weight": embedding}}
    name = f"{decoder_class.__name__.removesuffix('Model')}ForCausalLM"
    causal = type(name, (_Causal, base, GenerationMixin), members)
    for mapping, model_class in ((MODEL_MAPPING, decoder_class), (MODEL_FOR_CAUSAL_LM_MAPPING, causal)):
        if config_class not in mapping:
            register: Any = mapping.register
            register(config_class, model_class, exist_ok=True)
