"""What is done with one model, dense or pruned, outside of a pruning run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from adapruner.calibration import parse_source, text_windows
from adapruner.checkpoint import (
    GgufType,
    card_of_export,
    check_gguf,
    check_push,
    push,
    save_checkpoint,
    write_gguf,
)
from adapruner.config import Dtype
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import Perplexity, measure_perplexity
from adapruner.job import evenly_spaced
from adapruner.models import (
    ModelLocation,
    empty_model,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
)
from adapruner.progress import Reporter
from adapruner.structure import Structure, build_structure
from adapruner.surgery import check_paddable, pad_to_stock

ExportFormat = Literal["gguf", "stock"]


def load(model: str | Path, dtype: Dtype = "auto", device: str = "auto") -> PreTrainedModel:
    """Loads a pruned or a dense model, ready to `generate`.

    Args:
        model: hub id, model folder (as in `RUN/model`), `.gguf` file, or `smollm2`.
        dtype: `auto` keeps that of the checkpoint.
        device: `auto` takes the first GPU where there is one, else the CPU.

    Raises:
        AdaPrunerError: there is no such model, or it cannot be read.
    """
    return load_model(find_model(str(model)), dtype, device)


def evaluate(
    model: str | Path,
    perplexity: Sequence[str] = ("wikitext2", "ptb"),
    window_length: int = 128,
    limit: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> list[Perplexity]:
    """Perplexity of any model on any texts, each with its protocol.

    Args:
        model: as for `load`.
        perplexity: text sources.
        window_length: tokens per window; 128 is the protocol of LLM-Pruner (arXiv 2305.11627).
        limit: take only so many windows of each text, evenly spaced.

    Raises:
        AdaPrunerError: an option, the model or a text will not do; before the weights are loaded.
    """
    if window_length < 2 or (limit is not None and limit < 1):
        raise AdaPrunerError(f"windows need at least 2 tokens, and a limit at least 1: {window_length}, {limit}")
    resolve_device(device)
    location = find_model(str(model))
    tokenizer = load_tokenizer(location)
    texts = {
        str(source): evenly_spaced(text_windows(source, tokenizer, window_length), limit)
        for source in map(parse_source, perplexity)
    }
    reporter = Reporter()
    with reporter.stage("loading", 1) as advance:
        loaded = load_model(location, dtype, device)
        advance()
    with reporter.stage("evaluating", sum(map(len, texts.values()))) as advance:
        return [measure_perplexity(loaded, windows, text, advance) for text, windows in texts.items()]


def inspect(model: str | Path) -> Structure:
    """What of a model can be pruned, from its config alone.

    Raises:
        AdaPrunerError: there is no such model, or its family is not known.
    """
    return build_structure(empty_model(load_config(find_model(str(model)))))


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
    path = Path(output)
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
        if to == "gguf":
            write_gguf(loaded, tokenizer, path, gguf_type)
        else:
            padded = pad_to_stock(loaded)
            save_checkpoint(padded, tokenizer, path, _card(location, padded))
        advance()
    if push_to_hub:
        push(path, push_to_hub)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Exported(path, sum(file.stat().st_size for file in files))


def _card(location: ModelLocation, exported: PreTrainedModel) -> str | None:
    readme = Path(location.path) / "README.md"
    if location.gguf_file or not readme.is_file():
        return None
    return card_of_export(readme.read_text(), exported.config)
