"""Models and text as users give them: by name, or in memory, which a run saves to its folder first, so that it can be
resumed and repeated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import replace, staging_folder
from adapruner.checkpoint import save_checkpoint
from adapruner.families import learn
from adapruner.model.architecture import check_windows
from adapruner.model.loading import empty_model
from adapruner.text.reading import WINDOWS, text_rows

# A dataset: its name; documents, one by one or as rows with columns (a `datasets.Dataset`); or windows of tokens,
# [windows, tokens], int64.
TextData: TypeAlias = str | Path | Tensor | Iterable[str] | Iterable[Mapping[str, object]]


def check_prunable(model: PreTrainedModel) -> None:
    """Refuses what is no model in memory, or cannot be pruned; its family is known from then on."""
    if not isinstance(model, PreTrainedModel):
        raise AdaPrunerError(
            f"a {type(model).__name__} is not a PreTrainedModel of transformers: give a model, a Hub id or a path;"
            " merge an adapter of PEFT first, with merge_and_unload()"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AdaPrunerError("the weights of the model are not in memory (device meta): load it without offloading")
    learn(model.config)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise AdaPrunerError("the model has an adapter: merge it first, or remove it with delete_adapter()")
    # Of weights that several layers share, the first name counts alone.
    weights = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    if lacking := [name for name, _ in empty_model(model.config).named_parameters() if name not in weights]:
        raise AdaPrunerError(
            f"the model in memory has no {lacking[0]} of its own: weights that are quantized, or shared between layers,"
            " cannot be pruned; give the model without that"
        )


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> str:
    """Saves a model in memory below a folder; returns the path. The model is not changed, but for what
    `save_pretrained` notes in its config."""
    name = Path(str(model.name_or_path)).name.strip(".") or model.config.model_type
    return _save(folder, name, "", partial(save_checkpoint, model, tokenizer))


def save_text(data: TextData, folder: Path, use: str) -> str:
    """Saves documents or windows in memory below a folder; returns the path. The same text for two uses is one file,
    whose parts are kept apart.

    Args:
        use: what they are for, for messages.
    """
    if not isinstance(data, Tensor):
        return _save(folder, "text", ".jsonl", partial(_write_rows, data, use))
    check_windows(data, use)
    return _save(folder, "windows", ".safetensors", partial(save_file, {WINDOWS: data.detach().cpu().contiguous()}))


def _save(folder: Path, name: str, suffix: str, write: Callable[[Path], object]) -> str:
    """Writes a file or folder under a name that has a hash of its content, unless it exists; returns the path."""
    with staging_folder(folder / name) as made:
        write(made)
        files = sorted(made.rglob("*")) if made.is_dir() else [made]
        digest = hashlib.sha256(
            b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files if file.is_file())
        )
        path = folder / f"{name}-{digest.hexdigest()[:12]}{suffix}"
        if not path.exists():
            replace(made, path)
    return str(path)


def _write_rows(data: object, use: str, path: Path) -> None:
    if not isinstance(data, Iterable):
        raise AdaPrunerError(
            f"`{use}` is a {type(data).__name__}: expected the name of a dataset, documents or windows"
        )

    def rows() -> Iterator[dict[str, object]]:
        for number, item in enumerate(data, 1):
            if not isinstance(item, str | Mapping):
                raise AdaPrunerError(
                    f"item {number} of `{use}` is a {type(item).__name__}: expected text, rows with a column of text,"
                    " or a tensor of windows"
                )
            yield {"text": item} if isinstance(item, str) else dict(item)

    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in text_rows(rows(), use))
    if not path.stat().st_size:
        raise AdaPrunerError(f"`{use}` holds no text")
