"""Cutting the embeddings of a model, and the numbers of tokens in its configs."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.model.architecture import new_model
from adapruner.model.config import find_wrapper
from adapruner.model.places import ModelLocation, quiet_transformers
from adapruner.model.wrapper import give_wrapper, wrapper_of

# Fields of configs that hold a token, or lists of them.
_TOKENS = re.compile(
    r".*_token_(id|ids|index)|(begin_)?suppress_tokens|bad_words_ids|force_words_ids|forced_(bos|eos)_token_id"
)
# Fields that hold tokens in forms that are not renumbered.
_NOT_REWRITABLE = ("sequence_bias", "forced_decoder_ids", "constraints")
_SIZES = re.compile(r"(.*_)?vocab_size(_.*)?")


@dataclass(frozen=True)
class Vocabulary:
    """The kept tokens.

    Attributes:
        kept: their ids, ascending; the new id of a token is its place in this list.
        beyond: ids of added tokens that have no row in the embedding, ascending; their new ids follow those of the kept
            tokens.
    """

    kept: tuple[int, ...]
    beyond: tuple[int, ...] = ()

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """The new ids, by old id."""
        return {old: new for new, old in enumerate((*self.kept, *self.beyond))}


def named_tokens(settings: PreTrainedConfig | GenerationConfig) -> set[int]:
    """The tokens that a config names: for beginning, end and padding, suppressed ones, and so on. Refuses a field that
    names tokens in a form that cannot be renumbered."""
    for name in _NOT_REWRITABLE:
        if getattr(settings, name, None):
            raise AdaPrunerError(f"the config of the model sets {name}, whose tokens cannot be renumbered: remove it")
    return {token for _, _, value in _token_fields(settings) for token in _numbers(value) if token >= 0}


def configs_with_tokens(
    location: ModelLocation, config: PreTrainedConfig
) -> tuple[PreTrainedConfig | GenerationConfig, ...]:
    """The configs that name tokens: of the model, or the multimodal model around it, and its generation config, from
    its own file or else from its config; reads no weights."""
    wrapper = find_wrapper(location)
    around = wrapper.config if wrapper else config
    if location.gguf_file is None:
        try:
            with quiet_transformers():
                return around, GenerationConfig.from_pretrained(location.path)
        except OSError:  # there is no such file
            pass
    return around, GenerationConfig.from_model_config(config)


def cut_config(config: PreTrainedConfig, vocabulary: Vocabulary) -> PreTrainedConfig:
    """A copy of a config for the smaller vocabulary, with the new tokens and sizes, also those of further tables."""
    cut = copy.deepcopy(config)
    _renumber(cut, vocabulary)
    # Other models inside a multimodal one have vocabularies of their own.
    for settings in {id(settings): settings for settings in (cut, cut.get_text_config(decoder=True))}.values():
        for name, rows in vars(settings).items():
            if _SIZES.fullmatch(name) and isinstance(rows, int) and rows > 0:
                setattr(settings, name, sum(token < rows for token in vocabulary.kept))
    return cut


def _renumber(settings: PreTrainedConfig | GenerationConfig, vocabulary: Vocabulary) -> None:
    """Gives the tokens that a config names their new numbers, in place."""
    for config, name, value in list(_token_fields(settings)):
        setattr(config, name, _renumbered(value, vocabulary))


def cut_vocabulary(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Removes the rows of all other tokens from a model, in place: of embeddings, output layer and bias, tied or not.

    The tensors with rows for tokens are those whose shape changes with the size of the vocabulary in the config.

    Raises:
        AdaPrunerError: the shape of a tensor changes in another way.
    """
    config = cut_config(model.config, vocabulary)
    with torch.device("meta"):
        smaller = new_model(config)
    # Several modules share a tied weight.
    done: dict[int, nn.Parameter | Tensor] = {}
    kept = torch.tensor(vocabulary.kept)
    for path, module in model.named_modules():
        cut = smaller.get_submodule(path)
        for tensors, cut_tensors in ((module._parameters, cut._parameters), (module._buffers, cut._buffers)):
            for name, tensor in tensors.items():
                wanted = cut_tensors.get(name)
                if tensor is None or wanted is None or tensor.shape == wanted.shape:
                    continue
                if id(tensor) not in done:
                    done[id(tensor)] = _cut_rows(f"{path}.{name}", tensor, wanted, kept)
                tensors[name] = done[id(tensor)]
        # Counts that modules have in addition to the config, as `num_embeddings`.
        for name, count in vars(cut).items():
            if type(count) is int and vars(module).get(name) != count:
                setattr(module, name, count)
    model.config.__dict__.update(config.__dict__)
    _renumber(model.generation_config, vocabulary)
    if wrapper := wrapper_of(model):
        give_wrapper(model, replace(wrapper, config=cut_config(wrapper.config, vocabulary)))
    model.tie_weights()


def _cut_rows(name: str, tensor: Tensor, wanted: Tensor, kept: Tensor) -> Tensor:
    differing = [axis for axis, size in enumerate(tensor.shape) if size != wanted.shape[axis]]
    rows = kept[kept < tensor.shape[differing[0]]]
    if len(differing) != 1 or len(rows) != wanted.shape[differing[0]] or tensor.is_meta:
        raise AdaPrunerError(
            f"{name} changes from {tuple(tensor.shape)} to {tuple(wanted.shape)} with the vocabulary, not by a row for"
            " each token: the vocabulary of this model cannot be pruned"
        )
    cut = tensor.detach().index_select(differing[0], rows.to(tensor.device))
    return nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut


def _token_fields(settings: Any) -> Iterator[tuple[Any, str, Any]]:
    """The config, name and value of every field that holds tokens, in a config and those inside it."""
    for name, value in vars(settings).items():
        if isinstance(value, PreTrainedConfig):
            yield from _token_fields(value)
        elif _TOKENS.fullmatch(name) and value is not None:
            yield settings, name, value


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, int):
        yield value


def _renumbered(value: Any, vocabulary: Vocabulary) -> Any:
    """Numbers that are not tokens, as -1, are left unchanged."""
    if isinstance(value, list | tuple):
        return [_renumbered(entry, vocabulary) for entry in value]
    return vocabulary.new_ids.get(value, value)
