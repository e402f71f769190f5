"""Models in other forms than a folder for transformers: a module for each form, which registers itself."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.model.places import ModelLocation
from adapruner.options import GgufType


@dataclass(frozen=True)
class Export:
    """A model to write.

    Attributes:
        path: the file or folder to write.
        gguf_type: type of the matrices in a GGUF file.
        location: of the model.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    path: Path
    gguf_type: GgufType
    location: ModelLocation


@dataclass(frozen=True)
class Format:
    """A form in which models are written.

    Attributes:
        check: refuses a model, which may have no weights, and a type for which it cannot be written.
        write: writes it.
        is_file: it is one file, and not a folder.
    """

    check: Callable[[PreTrainedModel, GgufType], None]
    write: Callable[[Export], None]
    is_file: bool


_FORMATS: dict[str, Format] = {}


def register_format(
    name: str, check: Callable[[PreTrainedModel, GgufType], None], is_file: bool = False
) -> Callable[[Callable[[Export], None]], Callable[[Export], None]]:
    """A decorator that makes a function the writer of a form; `Format` explains the arguments."""

    def register(write: Callable[[Export], None]) -> Callable[[Export], None]:
        _FORMATS[name] = Format(check, write, is_file)
        return write

    return register


def formats() -> dict[str, Format]:
    """The forms by name, once every module beside this one is imported."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _FORMATS
