"""Image features in windows of tokens, and decoders that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.models._architecture import architecture_of

_ATTRIBUTE = "pictures"
_MASK = "attention_mask"


@dataclass(frozen=True)
class Pictures:
    """What a decoder reads besides tokens. In windows, the negative token -1 - n stands for row n of the features.

    Attributes:
        features: [rows, hidden], the outputs of the projector.
        window: [rows], int64, from 1 on: the window that each row is in.
        arguments: further arguments of the decoder by name, [1 + windows, ·]; the first entry is that of text alone.
            The names of masks for kinds of layers have the kind after a dot. Empty if these are those of text.
    """

    features: Tensor
    window: Tensor
    arguments: Mapping[str, Tensor] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> Pictures:
        return self

    def arguments_for(self, tokens: Tensor, embedded: Tensor) -> dict[str, Any]:
        """The arguments of the decoder for windows.

        Args:
            tokens: [windows, tokens], int64.
            embedded: [windows, tokens, hidden], the embeddings of the tokens, arbitrary for negative ones.
        """
        is_row = tokens < 0
        rows = (-1 - tokens)[is_row].to(self.features.device)
        embedded = embedded.masked_scatter(is_row[..., None], self.features[rows].to(embedded))
        # Rows are numbered window by window.
        last = (-1 - tokens).amax(1).to(self.window.device)
        windows = torch.where(last < 0, 0, self.window[last.clamp_min(0)])
        arguments: dict[str, Any] = {"inputs_embeds": embedded}
        for name, values in self.arguments.items():
            chosen = values[windows].to(embedded.device)
            if name == "position_ids":
                arguments[name] = chosen.movedim(1, 0) if chosen.dim() == 3 else chosen
            else:
                arguments.setdefault(_MASK, {})[name.partition(".")[2]] = chosen
        return arguments


def show_pictures(model: PreTrainedModel, pictures: Pictures | None) -> PreTrainedModel:
    """Makes the decoder of a model read windows with image features, instead of those that it read before."""
    decoder: Any = model.get_submodule(architecture_of(model.config).layers.rpartition(".")[0])
    if handle := vars(decoder).pop("pictures_handle", None):
        handle.remove()
    setattr(model, _ATTRIBUTE, pictures)
    if pictures is not None:
        decoder.pictures_handle = decoder.register_forward_pre_hook(_Reading(pictures), with_kwargs=True)
    return model


def pictures_of(model: PreTrainedModel) -> Pictures | None:
    """The image features that a model reads."""
    return getattr(model, _ATTRIBUTE, None)


@contextmanager
def reading_pictures(model: PreTrainedModel, pictures: Pictures | None) -> Iterator[None]:
    """While it lasts, a model reads windows with other image features."""
    before = pictures_of(model)
    show_pictures(model, pictures)
    try:
        yield
    finally:
        show_pictures(model, before)


@dataclass(frozen=True)
class _Reading:
    """A hook before the decoder."""

    pictures: Pictures

    def __call__(self, decoder: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        tokens = arguments[0] if arguments else named.get("input_ids")
        if tokens is None or bool((tokens >= 0).all()):
            return None
        embedded = decoder.get_input_embeddings()(tokens.clamp_min(0))
        read = self.pictures.arguments_for(tokens, embedded)
        return arguments[:0], {name: value for name, value in named.items() if name != "input_ids"} | read
