"""Reading the metadata of a GGUF file, without its tokens, once its header is known to be sound."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from transformers import PreTrainedConfig

from adapruner.errors import AdaPrunerError

# More than any model has. Readers of others make objects of some hundred bytes of every entry.
_MOST_FIELDS, _MOST_ENTRIES, _MOST_TENSORS, _MOST_DIMENSIONS = 2**12, 2**22, 2**14, 4
_WIDTHS = {kind: np.dtype(scalar).itemsize for kind, scalar in gguf.GGUFReader.gguf_scalar_to_np.items()}
# Longer than any list with an entry for each layer.
_LONGEST_LIST = 2**12
_ARRAY_HEADER = struct.Struct("<IQ")
_STRING_LENGTH = struct.Struct("<Q")
_NOTHING = np.zeros(1, dtype=np.uint8)


def check_header(path: Path) -> None:
    """Reads the header of a GGUF file, in memory that does not depend on what it says.

    Raises:
        ValueError: the file does not hold what its header describes, or two tensors share bytes or a name.
    """
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
