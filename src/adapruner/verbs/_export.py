"""One model in other formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from adapruner.checkpoint import (
    card_of_export,
    check_gguf,
    check_push,
    push,
    read_card,
    save_checkpoint,
    write_gguf,
)
from adapruner.config import ExportFormat, GgufType
from adapruner.errors import AdaPrunerError, reason
from adapruner.models import empty_model, find_model, load_config, load_model, load_tokenizer
from adapruner.paths import output_path
from adapruner.progress import Reporter
from adapruner.surgery import check_paddable, pad_to_stock


@dataclass(frozen=True)
class Exported:
    """Where an export is, and its size in bytes."""

    path: Path
    size: int


def export(
    model: str | Path,
    to: ExportFormat,
    output: str | Path,
    gguf_type: GgufType = "f16",
    overwrite: bool = False,
    push_to_hub: str | None = None,
) -> Exported:
    """Writes a model, pruned or dense, in a form that other loaders read.

    Args:
        model: as for `load`.
        to: `gguf` writes one file for llama.cpp; `stock` a folder for any loader of the family, with short layers
            padded with zeros to the widest (see `surgery.pad_to_stock`).
        output: the file or folder.
        gguf_type: how a GGUF file stores matrices.
        overwrite: replace what is there.
        push_to_hub: upload the result to this repository.

    Raises:
        AdaPrunerError: the model cannot be written in this form, or something is there already.
    """
    path = output_path(output)
    if path.exists() and not overwrite:
        raise AdaPrunerError(f"{path} exists: choose another output, or --overwrite to replace it")
    if path.is_dir() != (to == "stock") and path.exists():
        raise AdaPrunerError(f"{path} is no {'folder' if to == 'stock' else 'file'}: choose another output")
    if path.is_dir() and not (path / "config.json").is_file() and any(path.iterdir()):
        raise AdaPrunerError(f"{path} holds something else than a model: choose another output")
    if push_to_hub:
        check_push(push_to_hub)
    location = find_model(str(model))
    without_weights = empty_model(load_config(location))
    if to == "gguf":
        check_gguf(without_weights)
    else:
        check_paddable(without_weights)
    tokenizer = load_tokenizer(location)
    reporter = Reporter()
    with reporter.stage("loading", 1) as advance:
        loaded = load_model(location, "auto", "cpu")
        advance()
    with reporter.stage("writing", 1) as advance:
        try:
            if to == "gguf":
                write_gguf(loaded, tokenizer, path, gguf_type)
            else:
                padded = pad_to_stock(loaded)
                save_checkpoint(padded, tokenizer, path, card_of_export(read_card(location), padded.config))
        except (OSError, SafetensorError) as error:
            raise AdaPrunerError(f"cannot write to {path}: {reason(error)}") from error
        advance()
    if push_to_hub:
        push(path, push_to_hub)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Exported(path, sum(file.stat().st_size for file in files))
