"""Multi-token prediction heads: further layers in the files of a model, which guess the tokens after the next one.

transformers leaves them out when it loads a model. They read the hidden state, whose size pruning keeps, so they are
copied from the files of the base model into those of the pruned one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from adapruner.models._places import ModelLocation
from adapruner.models._stored import StoredTensor, read_tensors, stored_tensors

_NAMED = re.compile(r"(^|\.)mtp[._]")
_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
_ATTRIBUTE = "multi_token_head"


def is_of_head(name: str, config: PreTrainedConfig) -> bool:
    """True for a tensor of a multi-token prediction head: its name has a part that begins with `mtp`, or it belongs to
    one of the layers that follow the last decoder layer, as many as the config counts.

    Args:
        name: in the files.
        config: of the model in these files.
    """
    if _NAMED.search(name):
        return True
    # transformers has one name, the files of most models the other.
    count = getattr(config, "num_mtp_layers", None) or getattr(config, "num_nextn_predict_layers", None)
    layer = _LAYER.search(name)
    return bool(layer and isinstance(count, int) and 0 <= int(layer[2]) - config.num_hidden_layers < count)


@dataclass(frozen=True)
class MultiTokenHead:
    """The tensors of a multi-token prediction head, in the files of the model that it was trained for.

    Attributes:
        stored: by their names in the files.
        layers: the number of decoder layers of that model.
        embedding: the shape of its embedding.
        kept_tokens: the tokens whose rows are kept in copies of the embedding and of the output layer; None: all.
    """

    stored: Mapping[str, StoredTensor]
    layers: int
    embedding: tuple[int, ...]
    kept_tokens: tuple[int, ...] | None = None

    @property
    def sentence(self) -> str:
        """The copy in a checkpoint, for people."""
        rows = "" if self.kept_tokens is None else ", without the rows of removed tokens"
        return f"{len(self.stored)} tensors of a multi-token prediction head were copied{rows}; the head is not pruned."

    def tensors(self, layers: int) -> dict[str, Tensor]:
        """The tensors for a model with this number of decoder layers, on the CPU: equal to those in the files, but for
        the rows of removed tokens. A layer after the last one has the number that follows in the smaller model."""
        tensors = read_tensors({name: name for name in self.stored}, self.stored)
        if self.kept_tokens is not None:
            kept = torch.tensor(self.kept_tokens)
            tensors = {
                name: tensor[kept] if tuple(tensor.shape) == self.embedding else tensor
                for name, tensor in tensors.items()
            }
        return {self._renumbered(name, layers): tensor for name, tensor in tensors.items()}

    def _renumbered(self, name: str, layers: int) -> str:
        if _NAMED.search(name):
            return name
        return _LAYER.sub(lambda layer: f"{layer[1]}layers.{int(layer[2]) - self.layers + layers}.", name, count=1)


def find_head(location: ModelLocation, config: PreTrainedConfig) -> MultiTokenHead | None:
    """The multi-token prediction head in the safetensors files of a model; None if they have none.

    Args:
        config: of the model.
    """
    if location.gguf_file:
        return None
    stored = stored_tensors(location.path, config)
    head = {name: tensor for name, tensor in stored.items() if is_of_head(name, config)}
    if not head:
        return None
    return MultiTokenHead(head, config.num_hidden_layers, (config.vocab_size, config.hidden_size))


def head_of(model: PreTrainedModel) -> MultiTokenHead | None:
    """The head that belongs to a model; None for a model without one, or one that was not loaded from files."""
    return getattr(model, _ATTRIBUTE, None)


def give_head(model: PreTrainedModel, head: MultiTokenHead | None) -> None:
    """Makes a head that of a model, with which it is saved."""
    setattr(model, _ATTRIBUTE, head)
