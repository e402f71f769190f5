"""A model, text or windows in memory, written to files: a run reads all of its inputs from files, so that it can be
resumed, joined and repeated."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration import WINDOWS, text_rows
from adapruner.checkpoint import save_checkpoint
from adapruner.errors import AdaPrunerError
from adapruner.families import learn
from adapruner.files import being_written
from adapruner.models import FILE_FIELDS, architecture_of, whole_state

# A dataset: its name; documents, one by one or as rows with columns (a `datasets.Dataset`); or windows of tokens,
# [windows, tokens], int64.
# A model: a name or path, or one in memory.
ModelGiven: TypeAlias = str | Path | PreTrainedModel
TextData: TypeAlias = str | Path | Tensor | Iterable[str] | Iterable[Mapping[str, object]]


def check_model(model: PreTrainedModel) -> None:
    """Refuses what is no model in memory; its family is known from then on.

    Raises:
        AdaPrunerError: with what it is.
    """
    if not isinstance(model, PreTrainedModel):
        raise AdaPrunerError(
            f"a {type(model).__name__} is not a PreTrainedModel of transformers: give a model, a Hub id or a path;"
            " merge an adapter of PEFT first, with merge_and_unload()"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AdaPrunerError("the weights of the model are not in memory (device meta): load it without offloading")
    learn(model.config)


def check_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer that a model in memory comes with.

    Raises:
        AdaPrunerError: there is none.
    """
    if tokenizer is None:
        raise AdaPrunerError("a model in memory needs its `tokenizer`")
    return tokenizer


def check_prunable(model: PreTrainedModel) -> None:
    """Refuses a model in memory that cannot be pruned.

    Raises:
        AdaPrunerError: see `check_model`; or its family cannot be pruned, it is quantized, or it has an adapter.
    """
    check_model(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise AdaPrunerError("the model has an adapter: merge it first, or remove it with delete_adapter()")
    architecture_of(model.config)


def write_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> Path:
    """Writes a model in memory below a folder, under a name that says its content, unless it is there; returns where.

    The model is not changed, but for what `save_pretrained` notes in its config. The cost is one copy on the disk, in
    the dtype of the weights.

    Raises:
        AdaPrunerError: it cannot be written.
    """
    name = Path(str(model.name_or_path)).name or model.config.model_type
    place = folder / f"{name}-{_hash_of_model(model, tokenizer)}"
    if not place.is_dir():
        save_checkpoint(model, tokenizer, place)
    return place


def _hash_of_model(model: PreTrainedModel, tokenizer: Tokenizer) -> str:
    settings = model.generation_config.to_dict() if model.generation_config else {}
    both = [
        {name: value for name, value in fields.items() if name not in FILE_FIELDS}
        for fields in (model.config.to_dict(), settings)
    ]
    digest = hashlib.sha256(json.dumps(both, sort_keys=True, default=str).encode())
    for name, tensor in sorted(whole_state(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    with tempfile.TemporaryDirectory() as written:
        tokenizer.save_pretrained(written)
        for file in sorted(Path(written).rglob("*")):
            digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:12]


def is_in_memory(data: TextData | None) -> bool:
    """True if it is text or windows, and not the name of a dataset."""
    return data is not None and not isinstance(data, str | Path)


def write_text(data: TextData, folder: Path, use: str) -> str:
    """The name of a dataset; text or windows in memory are written below a folder first, under a name that says their
    content.

    Args:
        use: what they are for, for messages. The name does not depend on it: the same text for two uses is one dataset,
            whose parts are kept apart.

    Raises:
        AdaPrunerError: it holds something else than text or windows, or nothing; or it cannot be written.
    """
    if isinstance(data, str | Path):
        return str(data)
    if isinstance(data, Tensor):
        return str(_write_windows(data, folder, use))
    digest, count = hashlib.sha256(), 0
    unnamed = folder / f".{use}-{os.getpid()}.jsonl"
    with being_written(unnamed) as partial, partial.open("w", encoding="utf-8") as file:
        for row in text_rows(_rows(data, use), use):
            count += 1
            line = json.dumps(row) + "\n"
            digest.update(line.encode())
            file.write(line)
    if not count:
        unnamed.unlink()
        raise AdaPrunerError(f"`{use}` holds no text")
    path = folder / f"text-{digest.hexdigest()[:12]}.jsonl"
    os.replace(unnamed, path)
    return str(path)


def _rows(data: Any, use: str) -> Iterator[dict[str, Any]]:
    if not isinstance(data, Iterable):
        raise AdaPrunerError(
            f"`{use}` is a {type(data).__name__}: expected the name of a dataset, documents or windows"
        )
    for number, item in enumerate(data, 1):
        if not isinstance(item, str | Mapping):
            raise AdaPrunerError(
                f"item {number} of `{use}` is a {type(item).__name__}: expected text, rows with a column of text, or a"
                " tensor of windows"
            )
        yield {"text": item} if isinstance(item, str) else dict(item)


def _write_windows(windows: Tensor, folder: Path, use: str) -> Path:
    if windows.dtype != torch.int64 or windows.dim() != 2 or not len(windows):
        raise AdaPrunerError(
            f"`{use}` is a tensor of {windows.dtype} and shape {list(windows.shape)}: windows are tokens, int64, of"
            " shape [windows, tokens]"
        )
    content = windows.detach().cpu().contiguous()
    path = folder / f"windows-{hashlib.sha256(content.numpy().tobytes()).hexdigest()[:12]}.safetensors"
    with being_written(path, f"-{os.getpid()}") as partial:
        save_file({WINDOWS: content}, partial)
    return path
