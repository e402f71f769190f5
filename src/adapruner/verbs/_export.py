"""One model in other formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapruner.card import card_of_export, read_card
from adapruner.checkpoint import (
    check_gguf,
    check_push,
    is_replaceable,
    push,
    read_origin,
    save_checkpoint,
    write_gguf,
)
from adapruner.config import ExportFormat, GgufType
from adapruner.errors import AdaPrunerError
from adapruner.models import ModelLocation, empty_model, find_model, load_config, load_model, load_tokenizer
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
    hub_private: bool = True,
    hub_revision: str | None = None,
    hub_token: str | None = None,
) -> Exported:
    """Writes a model, pruned or dense, in a form that other loaders read.

    Args:
        model: as for `load`.
        to: `gguf`: one file for llama.cpp; `stock`: a folder for any loader of the family (see `surgery.pad_to_stock`).
        output: the file or folder.
        gguf_type: how a GGUF file stores matrices.
        overwrite: replace an existing GGUF file, or a folder that this package wrote.
        push_to_hub: upload the result to this repository.
        hub_private: whether a new repository is private.
        hub_revision: branch.
        hub_token: by default that of the login.

    Raises:
        AdaPrunerError: the model cannot be written in this form, or the output cannot be replaced.
    """
    path = output_path(output)
    location = find_model(str(model))
    check_output(path, location, to, overwrite)
    if push_to_hub:
        check_push(push_to_hub, hub_token)
    (check_gguf if to == "gguf" else check_paddable)(empty_model(load_config(location)))
    tokenizer = load_tokenizer(location)
    reporter = Reporter()
    with reporter.stage("loading"):
        loaded = load_model(location, "auto", "cpu")
    with reporter.stage("writing"):
        if to == "gguf":
            write_gguf(loaded, tokenizer, path, gguf_type)
        else:
            padded = pad_to_stock(loaded)
            card = card_of_export(read_card(location), padded.config)
            save_checkpoint(padded, tokenizer, path, card, record=read_origin(location))
    if push_to_hub:
        push(path, push_to_hub, hub_private, hub_revision, hub_token)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Exported(path, sum(file.stat().st_size for file in files))


def check_output(path: Path, location: ModelLocation, to: ExportFormat, overwrite: bool) -> None:
    """Refuses to touch the model itself, and to replace what is not a result of this package."""
    if location.is_local:
        source, target = Path(location.path, location.gguf_file or "").resolve(), path.resolve()
        if source == target or source in target.parents or target in source.parents:
            raise AdaPrunerError(f"{path} overlaps the model {location}: choose another output")
    if not path.exists():
        return
    if not overwrite:
        raise AdaPrunerError(f"{path} exists: choose another output, or `overwrite` to replace it")
    if path.is_dir() != (to == "stock"):
        raise AdaPrunerError(f"{path} is no {'folder' if to == 'stock' else 'file'}: choose another output")
    if path.is_dir() and not is_replaceable(path):
        raise AdaPrunerError(f"{path} holds something else than what adapruner wrote: choose another output")
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise AdaPrunerError(f"{path} is something else than a GGUF file: choose another output")
