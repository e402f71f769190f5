"""The config of a model, read from its files or from the metadata of a GGUF file whose header is sound; refused if no
model can be built from it."""

import contextlib
import copy
import functools
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.model.architecture import family_named, is_pruned, lacks_attention, stock_config
from adapruner.model.codes import are_readable
from adapruner.model.places import ModelLocation, quiet_transformers, reported_as_unloadable
from adapruner.model.stored import has_own_output, stored_tensors
from adapruner.model.wrapper import Wrapper, decoder_config, find_text
from adapruner.remote_code.modeling_pruned import ATTENTION, pruned_config_class, without_layers

# More than any model has. Readers of others make objects of some hundred bytes of every entry.
_MOST_FIELDS, _MOST_ENTRIES, _MOST_TENSORS, _MOST_DIMENSIONS = 2**12, 2**22, 2**14, 4
_WIDTHS = {kind: np.dtype(scalar).itemsize for kind, scalar in gguf.GGUFReader.gguf_scalar_to_np.items()}
# Longer than any list with an entry for each layer.
_LONGEST_LIST = 2**12
_ARRAY_HEADER = struct.Struct("<IQ")
_STRING_LENGTH = struct.Struct("<Q")
_NOTHING = np.zeros(1, dtype=np.uint8)


def check_header(path: Path) -> None:
    """Reads the header of a GGUF file, in memory that does not depend on what it says."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        header = _Header(content)
        magic, _, tensors, fields = header.take("4sIQQ")
        if magic != b"GGUF":
            raise ValueError("it does not begin as a GGUF file")
        _check_count("fields", fields, _MOST_FIELDS)
        _check_count("tensors", tensors, _MOST_TENSORS)
        alignment, entries = gguf.GGUF_DEFAULT_ALIGNMENT, 0
        for _ in range(fields):
            name, kind, count = header.text(), GGUFValueType(*header.take("I")), 1
            if name == b"general.alignment" and kind == GGUFValueType.UINT32:
                (alignment,) = struct.unpack_from("<I", content, header.place)
            if kind == GGUFValueType.ARRAY:
                kind, count = header.take("IQ")
                entries += count
                _check_count("entries of lists", entries, _MOST_ENTRIES)
            if kind == GGUFValueType.STRING:
                for _ in range(count):
                    header.text()
            elif kind in _WIDTHS:
                header.skip(count * _WIDTHS[kind])
            else:
                raise ValueError("it has a list of lists")
        if alignment.bit_count() != 1:
            raise ValueError(f"its alignment is {alignment}, not a power of two")
        spans = sorted(header.span() for _ in range(tensors))
        if len({tensor for _, _, tensor in spans}) < tensors:
            raise ValueError("two tensors have the same name")
        free = start = -(-header.place // alignment) * alignment
        for offset, size, tensor in spans:
            if start + offset < free:
                raise ValueError(f"the tensor {tensor!r} shares bytes with another")
            free = start + offset + size
        if free > len(content):
            raise ValueError(f"its tensors need {free:,} bytes, and it has {len(content):,}")


class _Header:
    """A position in the header of a GGUF file."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place = content, 0

    def span(self) -> tuple[int, int, str]:
        """Offset, bytes and name of the next tensor."""
        name, (count,) = self.text().decode(), self.take("I")
        _check_count("dimensions", count, _MOST_DIMENSIONS)
        shape, (kind, offset) = self.take(f"{count}Q"), self.take("IQ")
        block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return offset, math.prod(shape) // block * size, name

    def text(self) -> bytes:
        (length,) = self.take("Q")
        self.skip(length)
        return self.content[self.place - length : self.place]

    def take(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{layout}")
        self.skip(size)
        return struct.unpack_from(f"<{layout}", self.content, self.place - size)

    def skip(self, size: int) -> None:
        self.place += size
        if self.place > len(self.content):
            raise ValueError("it ends within its header")


def _check_count(what: str, count: int, most: int) -> None:
    if count > most:
        raise ValueError(f"it says {count:,} {what}, more than {most:,}")


class _WithoutTokens(gguf.GGUFReader):
    """Skips lists of tokens, their scores and merges. The base class makes a NumPy array of every entry, which takes
    seconds for a vocabulary; only the number of entries is kept, from which transformers counts the tokens."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        data, kind, count = cast(Any, self.data), 0, 0
        if raw_type == GGUFValueType.ARRAY and self.byte_order == "I":
            kind, count = _ARRAY_HEADER.unpack_from(data, orig_offs)
        if count <= _LONGEST_LIST:
            parts: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return parts
        end, entries = orig_offs + _ARRAY_HEADER.size, list[int]()
        if kind == GGUFValueType.STRING:
            entries = [0] * count
            for _ in range(count):
                end += _STRING_LENGTH.size + _STRING_LENGTH.unpack_from(data, end)[0]
        else:
            end += count * _WIDTHS[GGUFValueType(kind)]
        return end - orig_offs, [_NOTHING], entries, [GGUFValueType.ARRAY, GGUFValueType.UINT8]


@contextlib.contextmanager
def without_tokens() -> Iterator[Callable[[str], gguf.GGUFReader]]:
    """While it lasts, transformers, which imports the reader when it reads, skips the tokens of GGUF files.

    Yields:
        The function with which transformers reads a file; a file is read once.
    """
    module: Any = gguf
    reader_class, module.GGUFReader = module.GGUFReader, functools.cache(_WithoutTokens)
    try:
        yield module.GGUFReader
    finally:
        module.GGUFReader = reader_class


# Tensors that scale rotary embeddings, of Llama 3 and of longrope.
_SCALED = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def computes_bfloat16_natively(device: torch.device) -> bool:
    """True if the device multiplies bfloat16 faster than float32; assumed for GPUs that are not installed."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    is_supported: Callable[[], bool] | None = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return bool(is_supported and is_supported())


def dtype_of_gguf(reader: gguf.GGUFReader) -> torch.dtype:
    """The dtype in which the weights of a GGUF file are held: bfloat16 if it has matrices of less than six bits, which
    are no more precise, and the machine multiplies that natively; else float32."""
    sizes = (gguf.GGML_QUANT_SIZES[tensor.tensor_type] for tensor in reader.tensors if len(tensor.shape) > 1)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    is_coarse = any(8 * size < 6 * count for count, size in sizes)
    return torch.bfloat16 if is_coarse and computes_bfloat16_natively(device or torch.device("cpu")) else torch.float32


def refuse_missing_weights(reader: gguf.GGUFReader, name: str, parameters: int) -> None:
    """Refuses a file with fewer weights than its model, before transformers allocates those."""
    stored = sum(tensor.n_elements for tensor in reader.tensors)
    if stored < parameters:
        raise AdaPrunerError(
            f"the GGUF file {name} holds {stored:,} weights, and its metadata describe a model of {parameters:,}"
        )


def refuse_what_is_not_read(reader: gguf.GGUFReader, name: str, config: PreTrainedConfig, has_biases: bool) -> None:
    """Refuses a file from which transformers would silently drop something: the scaling of rotary embeddings, or
    biases that its model class lacks.

    Args:
        name: of the model, for the message.
        config: the config that transformers reads from the file.
        has_biases: the layers of the model class have biases.
    """
    names = {tensor.name for tensor in reader.tensors}
    scaling = {name.partition(".")[2]: field for name, field in reader.fields.items() if ".rope.scal" in name}
    kind, *factors = (
        scaling[name].contents() if name in scaling else default
        for name, default in (("rope.scaling.type", "none"), ("rope.scaling.factor", 1.0), ("rope.scale_linear", 1.0))
    )
    is_scaled = bool(names & _SCALED) or kind not in ("none", "linear") or set(factors) != {1.0}
    known = getattr(config, "rope_parameters", None) or {}
    # Layers of different types may have their own parameters.
    by_type = [parameters for parameters in known.values() if isinstance(parameters, dict)]
    if is_scaled and all(parameters.get("rope_type", "default") == "default" for parameters in (known, *by_type)):
        lost = "the scaling of its rotary embeddings"
    elif not has_biases and any(name.startswith("blk.") and name.endswith(".bias") for name in names):
        lost = "the biases"
    else:
        return
    raise AdaPrunerError(
        f"transformers does not read {lost} from the GGUF file {name}: the model would compute something else; give the"
        " safetensors folder that the file was made from"
    )


# Fields that saving a model writes into its config. Keys leave them out; where the dtype counts, they have it besides.
FILE_FIELDS = ("_name_or_path", "architectures", "dtype", "transformers_version")
# By default, transformers asks on the terminal whether to run code from the folder.
NO_REMOTE_CODE = {"trust_remote_code": False}
# Building a model takes time for every layer, and the deepest ones have a few hundred.
_MOST_LAYERS = 2000
_LARGEST_VOCABULARY = 2**31 - 1
# Some 20 times the widest models: buffers of positions are made before weights are looked for.
_LARGEST_WIDTH = 2**20
_BIAS_OF_LAYER = re.compile(r"\.\d+\..*bias$")


def load_config(location: ModelLocation) -> PreTrainedConfig:
    """Reads the config alone. If local files hold an output matrix that differs from the embedding, it has
    `tie_word_embeddings=False`, as transformers then does not tie the two."""
    return _read(location)[0]


def find_wrapper(location: ModelLocation) -> Wrapper | None:
    """The multimodal model at a location, whose decoder `load_config` describes; None for a text model."""
    return _read(location)[1]


def _read(location: ModelLocation) -> tuple[PreTrainedConfig, Wrapper | None]:
    with reported_as_unloadable(location):
        if not location.is_local:
            return _read_config(location)
        files = [Path(location.path, location.gguf_file)] if location.gguf_file else Path(location.path).iterdir()
        stats = [(file.name, file.stat()) for file in files if file.is_file()]
        state = frozenset((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
        return copy.deepcopy(_read_config_once(location, state))


@lru_cache(maxsize=8)
def _read_config_once(
    location: ModelLocation, state: frozenset[tuple[str, int, int]]
) -> tuple[PreTrainedConfig, Wrapper | None]:
    """Cached, because output matrices have to be compared, and lists of tokens in a GGUF file skipped."""
    return _read_config(location)


def _read_config(location: ModelLocation) -> tuple[PreTrainedConfig, Wrapper | None]:
    config: PreTrainedConfig
    file = Path(location.path, location.gguf_file or "")
    if location.gguf_file:
        check_header(file)
    with without_tokens() as read:
        fields, _ = PreTrainedConfig.get_config_dict(location.path, **location.arguments)
    model_type = fields.get("model_type")
    # transformers counts `deci`, which has layers of different widths, as supported and has no class for it.
    if location.gguf_file and model_type not in CONFIG_MAPPING:
        raise AdaPrunerError(
            f"transformers cannot read the GGUF architecture {model_type!r} of {str(location)!r}: give the"
            " safetensors folder that the file was made from"
        )
    if "block_configs" in fields:
        raise AdaPrunerError(f"{str(location)!r} is a DeciLM checkpoint: give the folder that it was made from")
    wrapper = None
    # Config classes make lists of layers.
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for name in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
            if isinstance(part.get(name), int) and part[name] > _MOST_LAYERS:
                raise AdaPrunerError(
                    f"the config of {str(location)!r} says {name}: {part[name]}, more than {_MOST_LAYERS} layers"
                )
    # A pruned model has code with it. Of the decoder inside a multimodal model, the name of its config.
    has_code, differ = "auto_map" in fields, fields.get("per_layer_config") is not None
    inner = {name: value for name, value in fields.items() if has_code and isinstance(value, dict)}
    pruned_text = next((name for name, value in inner.items() if value.get("per_layer_config") is not None), None)
    # In some families, the layers of dense models differ too.
    if differ and not has_code and model_type in CONFIG_MAPPING:
        differ = not CONFIG_MAPPING[str(model_type)]().is_heterogeneous
    if location.gguf_file:
        config = CONFIG_MAPPING[str(model_type)].from_dict(fields)
    elif pruned_text:
        _refuse_odd_layers(fields[pruned_text]["per_layer_config"], location)
        dense = without_layers(fields[pruned_text])
        stock_fields = {name: value for name, value in fields.items() if name not in ("auto_map", "model_file")}
        whole = CONFIG_MAPPING[str(model_type)].from_dict(stock_fields | {pruned_text: dense})
        wrapper = Wrapper(location.path, whole, pruned_text)
        config = decoder_config(wrapper, fields[pruned_text])
    elif differ:
        _refuse_odd_layers(fields["per_layer_config"], location)
        if model_type not in CONFIG_MAPPING:
            raise AdaPrunerError(
                f"layers of {str(location)!r} differ, in a family that transformers does not have, {model_type!r}"
            )
        # A stock config class refuses head counts that differ between layers.
        config = pruned_config_class(str(model_type)).from_pretrained(location.path)
    else:
        config = AutoConfig.from_pretrained(location.path, **NO_REMOTE_CODE)
        if text := find_text(config):
            wrapper = Wrapper(location.path, config, text)
            config = decoder_config(wrapper, None)
        elif are_readable(fields.get("quantization_config") or {}):
            del config.quantization_config  # the weights are numbers once they are read
    clear_gguf_marks(config, location)
    drop_negative_tokens(config)
    if location.gguf_file:
        check_config(config, location)
        reader, model = read(str(file)), _stock_model(config)
        config.dtype = dtype_of_gguf(reader)
        refuse_missing_weights(reader, str(location), model.num_parameters())
        has_biases = any(_BIAS_OF_LAYER.search(name) for name in model.state_dict())
        refuse_what_is_not_read(reader, str(location), config, has_biases)
    elif getattr(config, "tie_word_embeddings", False):
        # Broken files are reported when they are loaded.
        with contextlib.suppress(Exception), quiet_transformers():
            list_stored = wrapper.stored if wrapper else partial(stored_tensors, location.path)
            stored = list_stored(config, local_files_only=True)
            config.tie_word_embeddings = not has_own_output(_stock_model(stock_config(config)), stored)
    return config, wrapper


def _stock_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The stock model of a config, without weights."""
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))


def drop_negative_tokens(settings: object) -> None:
    """Removes the -1 of models without such a token, which transformers reads and does not write."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(settings, name, None)
        if isinstance(token, int) and token < 0:
            setattr(settings, name, None)


def _refuse_odd_layers(layers: object, location: ModelLocation) -> None:
    """Refuses values of `per_layer_config` that are neither counts nor lists of counts, nor say that a layer has no
    attention."""
    for layer, counts in layers.items() if isinstance(layers, dict) else ():
        for name, count in counts.items() if isinstance(counts, dict) else ():
            numbers = count if isinstance(count, list) else [count]
            if name == "skip" and numbers == [ATTENTION]:
                continue
            if not all(number is None or (isinstance(number, int) and number <= _LARGEST_WIDTH) for number in numbers):
                raise AdaPrunerError(
                    f"the config of {str(location)!r} says {str(name)[:50]} of layer {str(layer)[:20]} in"
                    f" per_layer_config: {str(count)[:50]}, which no layer has"
                )


def check_config(config: PreTrainedConfig, location: ModelLocation) -> None:
    """Refuses a config of a known family from which no model can be built: layers differ in fields that do not count
    groups, a layer lacks the attention that it needs, or a count is impossible."""
    architecture = family_named(config.model_type)
    if architecture is None:
        return

    def refuse(problem: str) -> None:
        raise AdaPrunerError(f"the config of {str(location)!r} {problem}")

    if is_pruned(config):
        if odd := set(config.per_layer_attributes or ()) - architecture.layer_fields:
            refuse(f"says {str(min(odd))[:50]} in per_layer_config, in which layers cannot differ")
        for layer in range(config.num_hidden_layers):
            if not architecture.removable_attention and lacks_attention(config.per_layer_config[layer]):
                refuse(f"says that layer {layer} has no attention, without which no {config.model_type} works")
    fields, experts = architecture.config_fields, architecture.experts
    names = [fields.heads, fields.key_value_heads, fields.head_dim] if architecture.attention else []
    names += [fields.channels] if architecture.feed_forward else []
    names += [experts.count] if experts else []
    counts = {name: getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size")}
    shared = {}
    for index in range(config.num_hidden_layers if config.is_heterogeneous else 1):
        layer_config = config.per_layer_config[index] if config.is_heterogeneous else config
        place = f" of layer {index}" if config.is_heterogeneous else ""
        stated: dict[str | None, Any] = {name: getattr(layer_config, name, None) for name in names if name}
        counts |= {f"{name}{place}": count for name, count in stated.items() if count is not None}
        shared[place] = stated.get(fields.heads), stated.get(fields.key_value_heads)
    for name, count in counts.items():
        largest = _LARGEST_VOCABULARY if name == "vocab_size" else _LARGEST_WIDTH
        if not isinstance(count, int) or not 1 <= count <= largest:
            refuse(f"says {name}: {count!r}, which no model has")
    for place, (heads, key_value_heads) in shared.items():
        if heads and key_value_heads and heads % key_value_heads:
            refuse(f"says {heads} heads and {key_value_heads} KV heads{place}, which cannot be shared equally")


def clear_gguf_marks(target: PreTrainedConfig | PreTrainedModel, location: ModelLocation) -> None:
    """Weights read from a GGUF file are plain tensors, but transformers still calls the model quantized."""
    if location.gguf_file:
        for mark in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            target.__dict__.pop(mark, None)
