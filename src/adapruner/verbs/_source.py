"""The model of a verb: one to be loaded, or one in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.config import Dtype
from adapruner.errors import AdaPrunerError
from adapruner.families import open_config, open_model
from adapruner.models._loading import load_tokenizer
from adapruner.models._places import ModelLocation, find_model
from adapruner.run.given import ModelGiven, check_model, check_tokenizer


@dataclass(frozen=True)
class ModelSource:
    """A model that a verb works on: the location of one to load, or one in memory."""

    given: ModelLocation | PreTrainedModel

    @classmethod
    def of(cls, model: ModelGiven, dtype: Dtype = "auto", device: str = "auto") -> ModelSource:
        """The model that a user named or gave; refuses a model in memory that cannot be used as it is."""
        if isinstance(model, str | Path):
            return cls(find_model(str(model)))
        check_model(model)
        if (dtype, device) != ("auto", "auto"):
            raise AdaPrunerError("a model in memory is used as it is: leave `dtype` and `device` out, or use to()")
        return cls(model)

    @property
    def location(self) -> ModelLocation | None:
        """Location of the model; None for a model in memory."""
        return None if isinstance(self.given, PreTrainedModel) else self.given

    @property
    def config(self) -> PreTrainedConfig:
        return self.given.config if isinstance(self.given, PreTrainedModel) else open_config(self.given)

    def tokenizer(self, given: Tokenizer | None) -> Tokenizer:
        """The tokenizer in the files of the model, or the given one, which a model in memory alone needs and has."""
        if self.location is None:
            return check_tokenizer(given)
        if given is not None:
            raise AdaPrunerError("`tokenizer` is for a model in memory: leave it out, or load the model")
        return load_tokenizer(self.location)

    @contextlib.contextmanager
    def loaded(
        self, dtype: Dtype = "auto", device: str = "auto", layer_wise: bool = False
    ) -> Iterator[PreTrainedModel]:
        """The model in evaluation mode; a model in memory returns to its mode afterwards."""
        if not isinstance(self.given, PreTrainedModel):
            yield open_model(self.given, dtype, device, layer_wise)
            return
        training = [module for module in self.given.modules() if module.training]
        self.given.eval()
        try:
            yield self.given
        finally:
            for module in training:
                module.training = True
