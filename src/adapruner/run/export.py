"""One model in other forms: for other loaders, or with fewer tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import output_path
from adapruner.base.progress import Reporter
from adapruner.checkpoint import is_replaceable, read_origin, save_checkpoint
from adapruner.families import open_config, open_model
from adapruner.formats import Export, formats
from adapruner.formats.gguf_checks import StoredTypes, read_stored_types
from adapruner.model.architecture import architecture_of, has_causal_model
from adapruner.model.loading import empty_model, load_tokenizer
from adapruner.model.places import ModelLocation, find_model
from adapruner.model.wrapper import wrapper_of
from adapruner.options import TOKENS_MULTIPLE, Dtype, GgufType, PruneOptions
from adapruner.report.card import vocabulary_card
from adapruner.report.result import shown_name
from adapruner.text.blends import record_of
from adapruner.text.sources import parse_source, texts_to_count
from adapruner.tokens.model import VocabularySummary, cut_vocabulary, fewer_tokens
from adapruner.tokens.tokenizer import cut_tokenizer


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
    model: str | Path, to: str, output: str | Path, gguf_type: GgufType = "f16", overwrite: bool = False
) -> Exported:
    """Writes a model, pruned or dense, in a form that other loaders read.

    Args:
        model: as for `load`.
        to: `gguf`: one file for llama.cpp; `decilm`: a folder for vLLM, SGLang, TensorRT-LLM and mlx-lm (see
            `decilm.check_decilm`).
        output: the file or folder.
        gguf_type: type of the matrices in a GGUF file, see `gguf.write_gguf`.
        overwrite: replace an existing GGUF file, or a folder that this package wrote.

    Raises:
        AdaPrunerError: the model cannot be written in this form, or the output cannot be replaced.
    """
    path, location = output_path(output), find_model(model)
    if (form := formats().get(to)) is None:
        raise AdaPrunerError(f"no format {to!r}: expected {' or '.join(sorted(formats()))}")
    check_output(path, location, overwrite, form.is_file)
    form.check(empty_model(open_config(location)), gguf_type)
    tokenizer, reporter = load_tokenizer(location), Reporter()
    with reporter.stage("loading"):
        loaded = open_model(location, "auto", "cpu")
    with reporter.stage("writing"):
        form.write(Export(loaded, tokenizer, path, gguf_type, location))
    if wrapper_of(loaded):
        reporter.note(
            "it is the decoder alone: the projector file (mmproj) is that of the original model, which pruning does"
            " not change"
        )
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    is_quantized = to == "gguf" and gguf_type not in ("f32", "f16", "bf16")
    stored = read_stored_types(path, gguf_type) if is_quantized else None
    return Exported(path, sum(file.stat().st_size for file in files), stored)


def check_output(path: Path, location: ModelLocation, overwrite: bool, is_file: bool = False) -> None:
    """Refuses an output that overlaps the model, or that would replace files that this package did not write.

    Args:
        is_file: True for a GGUF file, False for a folder.
    """
    if location.is_local:
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


class PrunedVocabulary(BaseModel, frozen=True):
    """A model with fewer tokens.

    Attributes:
        path: its folder.
        vocabulary: summary of the removed tokens.
    """

    path: Path
    vocabulary: VocabularySummary


def vocabulary(
    model: str | Path,
    vocabulary: str | Sequence[str],
    output: str | Path,
    vocabulary_size: int | str | None = None,
    vocabulary_multiple: int = TOKENS_MULTIPLE,
    overwrite: bool = False,
    dtype: Dtype = "auto",
) -> PrunedVocabulary:
    """Removes the tokens that text does not have from a model, with their rows of the embedding and the output layer.

    Every text is decoded as before. Text whose tokens are all kept has the same tokens, and the same logits for them.

    Args:
        model: as for `load`.
        vocabulary: the datasets whose tokens are kept; none stand for code and English if there is a `vocabulary_size`.
        output: the folder of the smaller model.
        vocabulary_size: tokens to keep, as 32k, the most likely in text like these; by default, all that occur.
        vocabulary_multiple: the number of kept tokens is rounded up to a multiple of this.
        overwrite: replace a folder that this package wrote.

    Raises:
        AdaPrunerError: an option, a text, the model or its tokenizer is invalid or cannot be cut exactly; before the
            weights are loaded.
    """
    if vocabulary_multiple < 1:
        raise AdaPrunerError("`vocabulary_multiple` must be at least 1")
    size = PruneOptions.from_options(vocabulary_size=vocabulary_size).vocabulary_size
    names = texts_to_count([vocabulary] if isinstance(vocabulary, str) else vocabulary, size)
    if not names:
        raise AdaPrunerError(
            "nothing says which tokens to keep: give `vocabulary`, text in the languages to keep, or `vocabulary_size`"
            " for those of code and English"
        )
    sources = [parse_source(name) for name in names]
    path, location = output_path(output), find_model(model)
    check_output(path, location, overwrite)
    config, tokenizer, reporter = open_config(location), load_tokenizer(location), Reporter()
    if not has_causal_model(config.model_type):
        architecture_of(config)  # refuses it
    with reporter.stage("counting tokens", None) as advance:
        most = int(size) if size else None
        chosen = fewer_tokens(location, config, tokenizer, sources, most, vocabulary_multiple, advance)
    cut = cut_tokenizer(tokenizer, chosen.vocabulary.new_ids)
    with reporter.stage("loading"):
        loaded = open_model(location, dtype, "cpu")
    cut_vocabulary(loaded, chosen.vocabulary)
    with reporter.stage("saving"):
        origin: dict[str, Any] = read_origin(location) or {"base_model": shown_name(str(model)), "texts": []}
        origin["texts"] = origin["texts"] + [{"use": "vocabulary"} | record_of(source) for source in sources]
        card = vocabulary_card(location, loaded.config, shown_name(str(model)), chosen.summary, names)
        save_checkpoint(loaded, cut, path, card, record=origin)
    return PrunedVocabulary(path=path, vocabulary=chosen.summary)
