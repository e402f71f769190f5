"""Removal of tokens from one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import output_path
from adapruner.base.progress import Reporter
from adapruner.checkpoint import read_origin, save_checkpoint
from adapruner.families import open_config, open_model
from adapruner.model.loading import load_tokenizer
from adapruner.model.places import find_model
from adapruner.options import Dtype
from adapruner.report.card import vocabulary_card
from adapruner.report.result import shown_name
from adapruner.run.export import check_output
from adapruner.text.sources import parse_source, source_names
from adapruner.text.uses import record_of
from adapruner.tokens.model import configs_with_tokens, cut_vocabulary
from adapruner.tokens.selecting import VocabularySummary, select_vocabulary
from adapruner.tokens.tokenizer import TokenizerParts, cut_tokenizer


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
    vocabulary_size: int | None = None,
    vocabulary_multiple: int = 64,
    overwrite: bool = False,
    dtype: Dtype = "auto",
) -> PrunedVocabulary:
    """Removes the tokens that text does not have from a model, with their rows of the embedding and the output layer.

    Every text is decoded as before. Text whose tokens are all kept has the same tokens, and the same logits for them.

    Args:
        model: as for `load`.
        vocabulary: the datasets whose tokens are kept.
        output: the folder of the smaller model.
        vocabulary_size: maximum number of tokens to keep, the most frequent ones.
        vocabulary_multiple: the number of kept tokens is rounded up to a multiple of this.
        overwrite: replace a folder that this package wrote.

    Raises:
        AdaPrunerError: an option, a text, the model or its tokenizer is invalid or cannot be cut exactly; before the
            weights are loaded.
    """
    if vocabulary_multiple < 1 or (vocabulary_size is not None and vocabulary_size < 1):
        raise AdaPrunerError("`vocabulary_size` and `vocabulary_multiple` must be at least 1")
    names = source_names([vocabulary] if isinstance(vocabulary, str) else vocabulary)
    if not names:
        raise AdaPrunerError("`vocabulary` names no text: give datasets or files in the languages to keep")
    sources = [parse_source(name) for name in names]
    path, location = output_path(output), find_model(str(model))
    check_output(path, location, overwrite)
    config, tokenizer, reporter = open_config(location), load_tokenizer(location), Reporter()
    with reporter.stage("counting tokens", None) as advance:
        naming = configs_with_tokens(location, config)
        chosen, summary = select_vocabulary(
            tokenizer, config, naming, sources, vocabulary_size, vocabulary_multiple, advance
        )
    cut = cut_tokenizer(tokenizer, TokenizerParts.of(tokenizer), chosen.new_ids)
    with reporter.stage("loading"):
        loaded = open_model(location, dtype, "cpu")
    cut_vocabulary(loaded, chosen)
    with reporter.stage("saving"):
        origin: dict[str, Any] = read_origin(location) or {"base_model": shown_name(str(model)), "texts": []}
        origin["texts"] = origin["texts"] + [{"use": "vocabulary"} | record_of(source) for source in sources]
        card = vocabulary_card(location, loaded.config, shown_name(str(model)), summary, names)
        save_checkpoint(loaded, cut, path, card, record=origin)
    return PrunedVocabulary(path=path, vocabulary=summary)
