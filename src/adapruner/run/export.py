"""One model in other formats."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import output_path
from adapruner.base.progress import Reporter
from adapruner.checkpoint import is_replaceable, read_origin, save_checkpoint
from adapruner.gguf.checks import check_gguf
from adapruner.gguf.decilm import check_decilm, write_decilm
from adapruner.gguf.sizes import StoredTypes, read_stored_types
from adapruner.gguf.write import write_gguf
from adapruner.model.loading import empty_model
from adapruner.model.places import ModelLocation
from adapruner.model.wrapper import wrapper_of
from adapruner.options import ExportFormat, GgufType
from adapruner.report.card import card_of_export, read_card
from adapruner.run.given import ModelGiven, ModelSource


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
        to: `gguf`: one file for llama.cpp; `decilm`: a folder for vLLM, SGLang, TensorRT-LLM and mlx-lm (see
            `decilm.check_decilm`).
        output: the file or folder.
        gguf_type: type of the matrices in a GGUF file, see `gguf.write_gguf`.
        overwrite: replace an existing GGUF file, or a folder that this package wrote.
        tokenizer: for a model in memory.

    Raises:
        AdaPrunerError: the model cannot be written in this form, or the output cannot be replaced.
    """
    path = output_path(output)
    source = ModelSource.of(model)
    check_output(path, source.location, overwrite, is_file=to == "gguf")
    empty = empty_model(source.config)
    if to == "gguf":
        check_gguf(empty, gguf_type)
    else:
        check_decilm(empty.config)
    tokenizer = source.tokenizer(tokenizer)
    reporter = Reporter()
    with contextlib.ExitStack() as using:
        with reporter.stage("loading"):
            loaded = using.enter_context(source.loaded(device="cpu"))
        with reporter.stage("writing"):
            if to == "gguf":
                write_gguf(loaded, tokenizer, path, gguf_type)
            else:
                origin = read_origin(source.location) if source.location else None
                card = card_of_export(read_card(source.location)) if source.location else None
                save_checkpoint(loaded, tokenizer, path, card, record=origin, write=write_decilm)
        if wrapper_of(loaded):
            reporter.note(
                "it is the decoder alone: the projector file (mmproj) is that of the original model, which pruning does"
                " not change"
            )
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    is_quantized = to == "gguf" and gguf_type not in ("f32", "f16", "bf16")
    stored = read_stored_types(path, gguf_type) if is_quantized else None
    return Exported(path, sum(file.stat().st_size for file in files), stored)


def check_output(path: Path, location: ModelLocation | None, overwrite: bool, is_file: bool = False) -> None:
    """Refuses an output that overlaps the model, or that would replace files that this package did not write.

    Args:
        is_file: True for a GGUF file, False for a folder.
    """
    if location and location.is_local:
        source, target = Path(location.path, location.gguf_file or "").resolve(), path.resolve()
        if source == target or source in target.parents or target in source.parents:
            raise AdaPrunerError(f"{path} overlaps the model {location}: choose another output")
    if not path.exists():
        return
    if not overwrite:
        raise AdaPrunerError(f"{path} exists: choose another output, or `overwrite` to replace it")
    if path.is_dir() == is_file:
        raise AdaPrunerError(f"{path} is not a {'file' if is_file else 'folder'}: choose another output")
    if path.is_dir() and not is_replaceable(path):
        raise AdaPrunerError(f"{path} holds files that adapruner did not write: choose another output")
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise AdaPrunerError(f"{path} is not a GGUF file: choose another output")
