"""One model in other formats."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.card import card_of_export, read_card
from adapruner.checkpoint import is_replaceable, read_origin, save_checkpoint
from adapruner.config import ExportFormat, GgufType
from adapruner.decilm import check_decilm, write_decilm
from adapruner.errors import AdaPrunerError
from adapruner.gguf import StoredTypes, check_gguf, read_stored_types, write_gguf
from adapruner.models import ModelLocation, empty_model, find_wrapper, wrapper_of
from adapruner.paths import output_path
from adapruner.progress import Reporter
from adapruner.run.given import ModelGiven
from adapruner.surgery import check_paddable, is_as_large_as_dense, pad_to_stock
from adapruner.verbs._source import ModelSource


@dataclass(frozen=True)
class Exported:
    """The files of an export.

    Attributes:
        size: bytes of all files.
        stored_types: types of the tensors in a quantized GGUF file; None for other outputs.
    """

    path: Path
    size: int
    stored_types: StoredTypes | None = None


def export(
    model: ModelGiven,
    to: ExportFormat,
    output: str | Path,
    gguf_type: GgufType = "f16",
    overwrite: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Exported:
    """Writes a model, pruned or dense, in a form that other loaders read.

    Args:
        model: as for `load`; or a model in memory, which is not changed.
        to: `gguf`: one file for llama.cpp; `stock`: a folder for any loader of the family (see `surgery.pad_to_stock`);
            `decilm`: a folder for vLLM, SGLang, TensorRT-LLM and mlx-lm without padding (see `decilm.check_decilm`).
        output: the file or folder.
        gguf_type: type of the matrices in a GGUF file, see `gguf.write_gguf`.
        overwrite: replace an existing GGUF file, or a folder that this package wrote.
        tokenizer: for a model in memory.

    Raises:
        AdaPrunerError: the model cannot be written in this form, or the output cannot be replaced.
    """
    path = output_path(output)
    source = ModelSource.of(model)
    check_output(path, source.location, to, overwrite)
    empty = empty_model(source.config)
    if to == "gguf":
        check_gguf(empty, gguf_type)
    elif to == "decilm":
        check_decilm(empty.config)
    else:
        check_paddable(empty)
    tokenizer = source.tokenizer(tokenizer)
    reporter = Reporter()
    with contextlib.ExitStack() as using:
        with reporter.stage("loading"):
            loaded = using.enter_context(source.loaded(device="cpu"))
        with reporter.stage("writing"):
            if to == "gguf":
                write_gguf(loaded, tokenizer, path, gguf_type)
            elif to == "decilm":
                _write_decilm(loaded, tokenizer, path, source.location)
            else:
                reporter.note(_write_stock(loaded, tokenizer, path, source.location))
        if to != "stock" and wrapper_of(loaded):
            reporter.note(
                "it is the decoder alone: the projector file (mmproj) is that of the original model, which pruning does"
                " not change"
            )
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    is_quantized = to == "gguf" and gguf_type not in ("f32", "f16", "bf16")
    stored = read_stored_types(path, gguf_type) if is_quantized else None
    return Exported(path, sum(file.stat().st_size for file in files), stored)


def _write_decilm(loaded: PreTrainedModel, tokenizer: Tokenizer, path: Path, location: ModelLocation | None) -> None:
    origin = read_origin(location) if location else None
    card = card_of_export(read_card(location), loaded.config, "loading_decilm.md.jinja") if location else None
    save_checkpoint(loaded, tokenizer, path, card, record=origin, write=write_decilm)


def _write_stock(loaded: PreTrainedModel, tokenizer: Tokenizer, path: Path, location: ModelLocation | None) -> str:
    """Pads, saves, and returns a line on the cost of padding; empty if nothing was padded."""
    origin = read_origin(location) if location else None
    # Heads are missing after a plan, but not if only tokens were removed.
    padded = pad_to_stock(loaded, fills_heads=origin is not None and "plan" in origin)
    card = card_of_export(read_card(location), padded.config, wrapper=find_wrapper(location)) if location else None
    save_checkpoint(padded, tokenizer, path, card, record=origin)
    if padded is loaded:
        return ""
    before, after = (model.get_memory_footprint() / 1e6 for model in (loaded, padded))
    line = f"padding with zeros: {before:,.1f} MB of weights became {after:,.1f} MB"
    if not is_as_large_as_dense(padded, loaded):
        return line
    return f"{line}, no smaller than without pruning; `layout` uniform prunes to a stock model that needs no padding"


def check_output(path: Path, location: ModelLocation | None, to: ExportFormat, overwrite: bool) -> None:
    """Refuses an output that overlaps the model, or that would replace files that this package did not write."""
    if location and location.is_local:
        source, target = Path(location.path, location.gguf_file or "").resolve(), path.resolve()
        if source == target or source in target.parents or target in source.parents:
            raise AdaPrunerError(f"{path} overlaps the model {location}: choose another output")
    if not path.exists():
        return
    if not overwrite:
        raise AdaPrunerError(f"{path} exists: choose another output, or `overwrite` to replace it")
    if path.is_dir() == (to == "gguf"):
        raise AdaPrunerError(f"{path} is not a {'file' if to == 'gguf' else 'folder'}: choose another output")
    if path.is_dir() and not is_replaceable(path):
        raise AdaPrunerError(f"{path} holds files that adapruner did not write: choose another output")
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise AdaPrunerError(f"{path} is not a GGUF file: choose another output")
