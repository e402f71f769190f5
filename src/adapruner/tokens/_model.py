"""Cutting the embeddings of a model, and the numbers of tokens in its configs."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from adapruner.errors import AdaPrunerError
from adapruner.models import ModelLocation, new_model, quiet_transformers
from adapruner.tokens._choosing import Vocabulary

# Fields of configs that hold a token, or lists of them.
_TOKENS = re.compile(
    r".*_token_(id|ids|index)|(begin_)?suppress_tokens|bad_words_ids|force_words_ids|forced_(bos|eos)_token_id"
)
# Fields that hold tokens in other forms.
_NOT_REWRITABLE = ("sequence_bias", "forced_decoder_ids", "constraints")
_SIZES = re.compile(r"(.*_)?vocab_size(_.*)?")


def named_tokens(settings: PreTrainedConfig | GenerationConfig) -> set[int]:
    """The tokens that a config names: for beginning, end and padding, suppressed ones, and so on.

    Raises:
        AdaPrunerError: it names tokens in a field that is not known.
    """
    for name in _NOT_REWRITABLE:
        if getattr(settings, name, None):
            raise AdaPrunerError(f"the config of the model sets {name}, whose tokens cannot be renumbered: remove it")
    return {token for _, _, value in _token_fields(settings) for token in _numbers(value) if token >= 0}


def read_generation_config(location: ModelLocation, config: PreTrainedConfig) -> GenerationConfig:
    """The generation config beside a model, or else that of its config; reads no weights."""
    if location.gguf_file is None:
        try:
            with quiet_transformers():
                return GenerationConfig.from_pretrained(location.path)
        except OSError:  # there is none
            pass
    return GenerationConfig.from_model_config(config)


def cut_config(config: PreTrainedConfig, vocabulary: Vocabulary) -> PreTrainedConfig:
    """A copy of a config for the smaller vocabulary: sizes, also of tables beside the embedding, and tokens."""
    cut = copy.deepcopy(config)
    renumber(cut, vocabulary)
    for own in _configs(cut):
        for name, value in vars(own).items():
            if _SIZES.fullmatch(name) and isinstance(value, int) and value > 0:
                setattr(own, name, _rows_below(vocabulary, value))
    return cut


def renumber(settings: PreTrainedConfig | GenerationConfig, vocabulary: Vocabulary) -> None:
    """Gives the tokens that a config names their new numbers, in place."""
    for own, name, value in list(_token_fields(settings)):
        setattr(own, name, _renumbered(value, vocabulary))


def cut_vocabulary(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Removes the rows of all other tokens from a model, in place: of embeddings, output layer and bias, tied or not.

    Which tensors have rows for tokens is what changes with the size of the vocabulary in the config.

    Raises:
        AdaPrunerError: a tensor changes otherwise.
    """
    config = cut_config(model.config, vocabulary)
    with torch.device("meta"):
        smaller = new_model(config)
    # A tied weight stands in several modules.
    done: dict[int, nn.Parameter | Tensor] = {}
    kept = torch.tensor(vocabulary.kept)
    for name, module in model.named_modules():
        other = smaller.get_submodule(name)
        for of_module, of_other in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
            for own, tensor in of_module.items():
                wanted = of_other.get(own)
                if tensor is None or wanted is None or tensor.shape == wanted.shape:
                    continue
                if id(tensor) not in done:
                    done[id(tensor)] = _cut_rows(f"{name}.{own}", tensor, wanted, kept)
                of_module[own] = done[id(tensor)]
        _take_over_numbers(module, other)
    model.config.__dict__.update(config.__dict__)
    renumber(model.generation_config, vocabulary)
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


def _take_over_numbers(module: nn.Module, other: nn.Module) -> None:
    """Counts that modules keep beside the config, as `num_embeddings`."""
    for name, value in vars(other).items():
        if type(value) is int and vars(module).get(name) != value:
            setattr(module, name, value)


def _rows_below(vocabulary: Vocabulary, rows: int) -> int:
    """How many kept tokens a table of so many rows has."""
    return sum(token < rows for token in vocabulary.kept)


def _configs(settings: Any) -> Iterator[Any]:
    """A config and those inside it."""
    yield settings
    for value in vars(settings).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _token_fields(settings: Any) -> Iterator[tuple[Any, str, Any]]:
    """The object, name and value of every field that holds tokens."""
    for own in _configs(settings):
        for name, value in vars(own).items():
            if _TOKENS.fullmatch(name) and value is not None:
                yield own, name, value


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int):
        yield value


def _renumbered(value: Any, vocabulary: Vocabulary) -> Any:
    """Numbers that are no tokens, as -1, are left as they are."""
    if isinstance(value, list | tuple):
        return [_renumbered(one, vocabulary) for one in value]
    return vocabulary.new_ids.get(value, value)
