"""Damages the tensor infos of a GGUF file at random: each file is loaded, or refused in one line, and neither needs
more memory than twice the file.

    OMP_NUM_THREADS=1 python benchmarks/gguf_fuzz.py --files 2000

Dimensions, offsets, types, names, duplicates, overlaps, counts, alignment and the sizes in the config are changed, one
to four at a time, and bytes are cut off or replaced. The memory of the process may grow by twice the file, and 16 MiB
for what libraries cache; an address space of 256 MiB more ends what would need far more. Linux only.
"""

from __future__ import annotations

import contextlib
import gc
import io
import re
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import torch
from cyclopts import run as run_benchmark
from hypothesis import HealthCheck, given, seed as hypothesis_seed, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from adapruner.card import base_licence
from adapruner.errors import AdaPrunerError
from adapruner.gguf import write_gguf
from adapruner.models import find_model, load_config, load_model, load_tokenizer
from machine import MIB, describe, memory, reset_peak

SLACK, ADDRESSES = 16 * MIB, 256 * MIB
LONGEST_SECONDS = 20
_HEADER, _ALIGNMENT = 24, 32


@dataclass(frozen=True)
class Info:
    """A tensor as a GGUF file describes it."""

    name: bytes
    dims: tuple[int, ...]
    kind: int
    offset: int

    def packed(self) -> bytes:
        name = struct.pack("<Q", len(self.name)) + self.name
        dims = struct.pack(f"<I{len(self.dims)}Q", len(self.dims), *self.dims)
        return name + dims + struct.pack("<IQ", self.kind, self.offset)


@dataclass(frozen=True)
class Parts:
    """The parts of a GGUF file; `count` is the number of tensors that it says it has."""

    fields: bytes
    field_count: int
    infos: tuple[Info, ...]
    data: bytes
    count: int

    def packed(self) -> bytes:
        header = struct.pack("<IIQQ", gguf.GGUF_MAGIC, 3, self.count, self.field_count) + self.fields
        header += b"".join(info.packed() for info in self.infos)
        return header + bytes(-len(header) % _ALIGNMENT) + self.data


def tiny_model() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random Llama with a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<s>", "</s>", *alphabet, "te", "so"])}
    backend = Tokenizer(models.BPE(vocabulary, [("t", "e"), ("s", "o")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config), tokenizer


def write_healthy(path: Path) -> Parts:
    """Writes the tiny model, and returns the parts of the file."""
    write_gguf(*tiny_model(), path, "f32")
    content, reader = path.read_bytes(), gguf.GGUFReader(path)
    infos = [
        Info(it.name.encode(), tuple(map(int, it.shape)), int(it.tensor_type), it.data_offset - reader.data_offset)
        for it in reader.tensors
    ]
    end = reader.tensors[0].field.offset
    (field_count,) = struct.unpack_from("<Q", content, 16)
    return Parts(content[_HEADER:end], field_count, tuple(infos), content[reader.data_offset :], len(infos))


# Numbers at which sums and products of 32 and 64 bits end.
EDGES = st.sampled_from([0, 1, 2, 2**12, 2**16, 2**20, 2**26, 2**31, 2**32 - 1, 2**32, 2**62, 2**63, 2**64 - 1])
SIZES = st.integers(0, 300) | EDGES
_OF_ATTENTION = ("attention.head_count", "attention.head_count_kv", "attention.key_length", "rope.dimension_count")
CONFIG = ("embedding_length", "block_count", "feed_forward_length", "context_length", "vocab_size", *_OF_ATTENTION)


CHANGES = ("info", "twice", "overlap", "count", "size", "consistent", "deep", "field", "data", "gone")


def any_info(draw: st.DrawFn, info: Info) -> Info:
    """The info with a change."""
    change = draw(st.sampled_from(["dims", "number of dims", "offset", "kind", "name"]))
    if change == "dims" and info.dims:
        place = draw(st.integers(0, len(info.dims) - 1))
        return replace(info, dims=(*info.dims[:place], draw(SIZES), *info.dims[place + 1 :]))
    if change == "number of dims":
        return replace(info, dims=tuple(draw(st.lists(SIZES, max_size=9))))
    if change == "offset":
        return replace(info, offset=draw(SIZES.map(lambda size: size * 32 % 2**64) | SIZES))
    if change == "kind":
        return replace(info, kind=draw(st.integers(0, 45) | st.sampled_from([2**31, 2**32 - 1])))
    return replace(
        info, name=draw(st.binary(max_size=80) | st.sampled_from([b"blk.9999.attn_q.weight", b"output.weight"]))
    )


def resized(parts: Parts, name: str, size: int) -> Parts:
    """The parts with another size in the config, where it is stored as a number of 32 bits."""
    pattern = re.compile(re.escape(f"llama.{name}".encode()) + rb"\x04\0\0\0(....)", re.DOTALL)
    found = pattern.search(parts.fields)
    if found is None:
        return parts
    fields = parts.fields[: found.start(1)] + struct.pack("<I", size) + parts.fields[found.end(1) :]
    return replace(parts, fields=fields)


@st.composite
def damaged(draw: st.DrawFn, parts: Parts) -> bytes:
    """The bytes of a file with one to four kinds of damage."""
    cut: slice = slice(None)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3, 4]))):
        place = draw(st.integers(0, max(0, len(parts.infos) - 1)))
        info = parts.infos[place] if parts.infos else Info(b"x", (1,), 0, 0)
        before, after = parts.infos[:place], parts.infos[place + 1 :]
        change = draw(
            st.sampled_from(
                ["info", "twice", "overlap", "count", "size", "consistent", "deep", "field", "data", "gone"]
            )
        )
        if change == "info":
            parts = replace(parts, infos=(*before, any_info(draw, info), *after))
        elif change == "twice":
            again = replace(info, name=info.name + draw(st.sampled_from([b"", b"2"])))
            parts = replace(parts, infos=(*parts.infos, again), count=parts.count + 1)
        elif change == "overlap":
            parts = replace(parts, infos=tuple(replace(it, offset=info.offset) for it in parts.infos))
        elif change == "count":
            parts = replace(parts, count=draw(SIZES))
        elif change == "size":
            parts = resized(parts, draw(st.sampled_from(CONFIG)), draw(SIZES) % 2**32)
        elif change == "consistent":
            # Config and tensors agree on sizes that the file does not hold.
            size = draw(st.sampled_from([4, 96, 480, 2**12, 2**16, 2**20]))
            parts = resized(resized(parts, "embedding_length", size), "attention.key_length", max(2, size // 6))
            dims = [tuple(size if dim == 48 else dim for dim in it.dims) for it in parts.infos]
            parts = replace(
                parts, infos=tuple(replace(it, dims=new) for it, new in zip(parts.infos, dims, strict=True))
            )
        elif change == "deep":
            # Many layers whose tensors are in the same place.
            layers = draw(st.sampled_from([3, 64, 500]))
            first = [it for it in parts.infos if it.name.startswith(b"blk.0.")]
            names = ((it, it.name.replace(b".0.", b".%d." % layer, 1)) for layer in range(2, layers) for it in first)
            infos = (*parts.infos, *(replace(it, name=name) for it, name in names))
            parts = replace(resized(parts, "block_count", layers), infos=infos, count=len(infos))
        elif change == "field":
            field = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, draw(SIZES) % 2**32)
            parts = replace(parts, fields=parts.fields + field, field_count=parts.field_count + 1)
        elif change == "data":
            parts = replace(parts, data=draw(st.binary(max_size=200)) + parts.data[draw(st.integers(0, 2**16)) :])
        else:
            parts = replace(parts, infos=(*before, *after))
        if draw(st.integers(0, 19)) == 13:
            cut = slice(draw(st.integers(0, 30_000)))
    content = bytearray(parts.packed()[cut])
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 3]))):
        if content:
            content[draw(st.integers(0, min(len(content), 20_000) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


@contextlib.contextmanager
def limited_addresses(more: int) -> Iterator[None]:
    """While it lasts, the address space of the process may grow by so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class ViolationError(Exception):
    """A file that broke a rule."""


def outcome(path: Path) -> str:
    """What became of a file: `loaded`, or the beginning of the line that refused it.

    Raises:
        ViolationError: it took too much memory or time, or said something else than a line.
    """
    location, said, started = find_model(str(path)), io.StringIO(), time.monotonic()
    gc.collect()
    reset_peak()
    message, before, allowed = "loaded", memory("VmRSS"), 2 * path.stat().st_size + SLACK
    try:
        with (
            limited_addresses(allowed + ADDRESSES),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(said),
            warnings.catch_warnings(record=True) as warned,
        ):
            warnings.simplefilter("always")
            base_licence(location)
            load_config(location)
            load_tokenizer(location)
            load_model(location)(torch.tensor([[2, 3]]))
    except AdaPrunerError as error:
        message = str(error)
        if "\n" in message or "alloc" in message:
            raise ViolationError(message) from error
    except (Exception, MemoryError) as error:
        raise ViolationError(repr(error)) from error
    if (grown := memory("VmHWM") - before) > allowed:
        raise ViolationError(f"{grown / MIB:.0f} MiB for {path.stat().st_size / MIB:.1f} MiB: {message}")
    if said.getvalue() or warned:
        raise ViolationError(f"printed: {said.getvalue()} {[str(warning.message) for warning in warned]}")
    if time.monotonic() - started > LONGEST_SECONDS:
        raise ViolationError("too slow")
    return message


def fuzz(folder: Path, files: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often each outcome came about, and the violations, whose files are left in the folder."""
    # Of what was imported, nothing becomes garbage.
    gc.freeze()
    outcomes, violations = Counter[str](), list[str]()
    path = folder / "model.gguf"
    parts = write_healthy(path)
    assert parts.packed() == path.read_bytes()
    assert outcome(path) == "loaded"

    @hypothesis_seed(seed)
    @settings(max_examples=files, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged(parts))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            message = re.sub(r"'[^']*'|[\d,]+", "…", outcome(path)).partition(": ")
            outcomes[(message[2] or message[0])[:70]] += 1
        except ViolationError as violation:
            violations.append(f"wrong{len(violations)}.gguf: {violation}")
            path.rename(folder / f"wrong{len(violations) - 1}.gguf")

    check()
    return outcomes, violations


def main(*, files: int = 2000, seed: int = 0, folder: Path | None = None) -> None:
    """Prints the outcomes; ends with code 1 if a file broke a rule.

    Args:
        folder: where such files are kept.
    """
    print(describe())
    with tempfile.TemporaryDirectory() as temporary:
        outcomes, violations = fuzz(folder or Path(temporary), files, seed)
    print(f"{sum(outcomes.values()) + len(violations)} files, {len(outcomes)} outcomes, {len(violations)} violations")
    print(*(f"{count:6} {message}" for message, count in outcomes.most_common()), *violations, sep="\n")
    sys.exit(bool(violations))


if __name__ == "__main__":
    run_benchmark(main)
