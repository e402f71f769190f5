"""Reading the metadata of a GGUF file, without its tokens."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any, cast

import gguf
import numpy as np
from transformers import PreTrainedConfig

from adapruner.errors import AdaPrunerError

# Longer than any list with an entry for each layer.
_LONGEST_LIST = 2**12
_ARRAY_HEADER = struct.Struct("<IQ")
_STRING_LENGTH = struct.Struct("<Q")
_NOTHING = np.zeros(1, dtype=np.uint8)


class _WithoutTokens(gguf.GGUFReader):
    """Skips lists of tokens, their scores and merges. The base class makes a NumPy array of every entry, which takes
    seconds for a vocabulary; only the number of entries is kept, from which transformers counts the tokens."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type == gguf.GGUFValueType.ARRAY and self.byte_order == "I":
            data: Any = self.data
            kind, count = _ARRAY_HEADER.unpack_from(data, orig_offs)
            if count > _LONGEST_LIST:
                start = orig_offs + _ARRAY_HEADER.size
                end = self._end_of_list(start, gguf.GGUFValueType(kind), count)
                if end > len(data):
                    raise ValueError("a list is longer than the file")
                entries = [0] * count if kind == gguf.GGUFValueType.STRING else []
                return end - orig_offs, [_NOTHING], entries, [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8]
        parts: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
        return parts

    def _end_of_list(self, start: int, kind: gguf.GGUFValueType, count: int) -> int:
        if kind != gguf.GGUFValueType.STRING:
            return int(start + count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize)
        end, data = start, cast(Any, self.data)
        for _ in range(count):
            end += _STRING_LENGTH.size + _STRING_LENGTH.unpack_from(data, end)[0]
        return end


@contextlib.contextmanager
def without_tokens() -> Iterator[list[gguf.GGUFReader]]:
    """While it lasts, transformers, which imports the reader when it reads, skips the tokens of GGUF files.

    Yields:
        The readers that transformers has made.
    """
    module: Any = gguf
    readers: list[gguf.GGUFReader] = []

    def read(*arguments: Any, **options: Any) -> gguf.GGUFReader:
        readers.append(_WithoutTokens(*arguments, **options))
        return readers[-1]

    reader_class, module.GGUFReader = module.GGUFReader, read
    try:
        yield readers
    finally:
        module.GGUFReader = reader_class


# Tensors that scale rotary embeddings, of Llama 3 and of longrope.
_SCALED = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def refuse_what_is_not_read(reader: gguf.GGUFReader, name: str, config: PreTrainedConfig, has_biases: bool) -> None:
    """Refuses a file from which transformers would silently drop something: the scaling of rotary embeddings, or
    biases that its model class lacks.

    Args:
        reader: reader of the file.
        name: name of the model, for the message.
        config: the config that transformers reads from the file.
        has_biases: the layers of the model class have biases.

    Raises:
        AdaPrunerError: something would be dropped; the message has an alternative.
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
