"""Image features in windows of tokens: how a decoder inside a multimodal model is called with them, and reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.errors import AdaPrunerError
from adapruner.models._architecture import architecture_of
from adapruner.models._layers import other_forwards
from adapruner.models._wrapper import TEXT_ARGUMENTS, inner_decoder

_ATTRIBUTE = "adapruner_pictures"
_EMBEDDED, _MASK, _POSITIONS = "inputs_embeds", "attention_mask", "position_ids"


@dataclass(frozen=True)
class Pictures:
    """A table of image features. In windows, the negative token -1 - n stands for row n.

    Attributes:
        first: the number of the first row; those of tables that are used together do not overlap.
        features: [rows, hidden], the outputs of the projector.
        window: [rows], int64, from 1 on: the window that each row is in.
        arguments: positions and masks of the decoder by name, [1 + windows, ·], the first those of text alone; names of
            masks have the kind of the layers after a dot, if there are several. Empty if all are those of text.
    """

    first: int
    features: Tensor
    window: Tensor
    arguments: Mapping[str, Tensor]

    def __deepcopy__(self, memo: Any) -> Pictures:
        return self

    def has(self, row: int) -> bool:
        """True if the table has a row."""
        return self.first <= row < self.first + len(self.features)

    def arguments_for(self, tokens: Tensor, embedded: Tensor) -> dict[str, Any]:
        """The arguments of the decoder for windows, by name.

        Args:
            tokens: [windows, tokens], int64.
            embedded: [windows, tokens, hidden], the embeddings of the tokens, arbitrary for negative ones.
        """
        rows = (-1 - tokens - self.first).to(self.features.device)
        is_row = tokens < 0
        features = self.features[rows[is_row.to(rows.device)]].to(embedded)
        arguments: dict[str, Any] = {_EMBEDDED: embedded.masked_scatter(is_row[..., None], features)}
        last = rows.amax(1)
        windows = torch.where(last < 0, 0, self.window[last.clamp_min(0)])
        for name, values in self.arguments.items():
            chosen, kind = values[windows].to(embedded.device), name.partition(".")[2]
            if kind:
                arguments.setdefault(_MASK, {})[kind] = chosen
            else:
                arguments[name] = chosen.movedim(1, 0) if name == _POSITIONS and chosen.dim() == 3 else chosen
        return arguments


def show_pictures(model: PreTrainedModel, tables: Sequence[Pictures]) -> PreTrainedModel:
    """Makes the decoder of a model read windows with rows of tables, instead of those that it read before."""
    if not tables and not pictures_of(model):
        return model
    decoder: Any = model.get_submodule(architecture_of(model.config).layers.rpartition(".")[0])
    if handle := vars(decoder).pop(_ATTRIBUTE, None):
        handle.remove()
    setattr(model, _ATTRIBUTE, tuple(tables))
    if tables:
        setattr(decoder, _ATTRIBUTE, decoder.register_forward_pre_hook(_Reading(tuple(tables)), with_kwargs=True))
    return model


def pictures_of(model: PreTrainedModel) -> tuple[Pictures, ...]:
    """The tables that a model reads."""
    tables: tuple[Pictures, ...] = getattr(model, _ATTRIBUTE, ())
    return tables


@dataclass(frozen=True)
class _Reading:
    """A hook before the decoder."""

    tables: tuple[Pictures, ...]

    def __call__(self, decoder: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        tokens = arguments[0] if arguments else named.get("input_ids")
        if tokens is None or (least := int(tokens.min())) >= 0:
            return None
        table = next(table for table in self.tables if table.has(-1 - least))
        embedded = decoder.get_input_embeddings()(tokens.clamp_min(0))
        return (), {**named, "input_ids": None, **table.arguments_for(tokens, embedded)}


@dataclass(frozen=True)
class Seen:
    """What a decoder is called with for one window.

    Attributes:
        embedded: [tokens, hidden].
        is_image: [tokens], bool: where that is no embedding of a token.
        arguments: as in `Pictures`, for one window.
    """

    embedded: Tensor
    is_image: Tensor
    arguments: dict[str, Tensor]


@torch.no_grad()
def see(whole: Any, inputs: Mapping[str, Tensor], seq_len: int) -> Seen:
    """The first tokens of the inputs of a multimodal model, as its decoder is called with them.

    Args:
        inputs: of a single prompt.

    Raises:
        AdaPrunerError: images reach the decoder in another way too.
    """
    decoder, called = inner_decoder(whole), dict[str, Any]()

    def note(*_: Any, **named: Any) -> None:
        called.update(named)
        raise _NotedError

    with other_forwards({decoder: note}), suppress(_NotedError):
        whole(**inputs, use_cache=False)
    if others := [name for name, value in called.items() if name not in TEXT_ARGUMENTS and value is not None]:
        raise AdaPrunerError(
            f"images reach the decoder of a {whole.config.model_type} as {', '.join(others)} too, which is not"
            " supported: name the column of text, as FILE:text, to use text alone"
        )
    tokens, embedded = inputs["input_ids"][0, :seq_len], called[_EMBEDDED][0, :seq_len]
    embedding = whole.get_input_embeddings()
    of_tokens = embedding(tokens.clamp_max(len(embedding.weight) - 1)).to(embedded)
    return Seen(embedded, (of_tokens != embedded).any(-1), _arguments(called, seq_len))


def with_text_alone(of_text: Seen, seen: Sequence[Seen]) -> dict[str, Tensor]:
    """The arguments of a table for windows, [1 + windows, ·], with those of a window of text alone at first."""
    windows, arguments = [of_text, *seen], dict[str, Tensor]()
    for name, like in (argument for window in windows for argument in window.arguments.items()):
        order = torch.arange(like.shape[-1], device=like.device)
        # Without images, some models leave positions to the decoder.
        ordinary = (order if name == _POSITIONS else order <= order[:, None]).to(like.dtype).expand(like.shape)
        if name not in arguments:
            arguments[name] = torch.stack([window.arguments.get(name, ordinary) for window in windows])
    return arguments


class _NotedError(Exception):
    """The decoder was called."""


def _arguments(called: Mapping[str, Any], seq_len: int) -> dict[str, Tensor]:
    """Positions and masks that differ from those of text alone, by their names in `Pictures`, for one window."""
    arguments = dict[str, Tensor]()
    positions, mask = called.get(_POSITIONS), called.get(_MASK)
    if positions is not None:
        positions = positions.squeeze(-2)[..., :seq_len]
        if positions.dim() > 1 or not positions.equal(torch.arange(seq_len).to(positions)):
            arguments[_POSITIONS] = positions
    for kind, values in (mask if isinstance(mask, dict) else {"": mask}).items():
        # A matrix of tokens alone says which are padding.
        if values is not None and values.dim() == 4:
            arguments[f"{_MASK}.{kind}".removesuffix(".")] = values[0, :, :seq_len, :seq_len]
    return arguments
