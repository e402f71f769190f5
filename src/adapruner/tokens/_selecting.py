"""From texts to the tokens that a model keeps."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._reading import stream_documents
from adapruner.calibration._sources import Source
from adapruner.errors import AdaPrunerError
from adapruner.models._architecture import new_model
from adapruner.structure._blocks import count_parameters
from adapruner.tokens._choosing import Vocabulary, VocabularySummary, choose_tokens
from adapruner.tokens._counting import count_tokens, scripts_of
from adapruner.tokens._model import cut_config, named_tokens
from adapruner.tokens._tokenizer import TokenizerParts


def select_vocabulary(
    tokenizer: Tokenizer,
    config: PreTrainedConfig,
    naming: Iterable[PreTrainedConfig | GenerationConfig],
    sources: Sequence[Source],
    size: int | None = None,
    multiple: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Vocabulary:
    """Counts the tokens of texts and chooses the tokens that a model keeps; reads no weights.

    Args:
        naming: the configs whose tokens are kept.
        size, multiple: see `choose_tokens`.
        progress: called with the number of documents read.

    Raises:
        AdaPrunerError: the tokenizer or the model cannot be cut, a text cannot be read, `size` is too small, or nothing
            would be removed.
    """
    parts, rows = TokenizerParts.of(tokenizer), config.get_text_config().vocab_size
    named = set[int]().union(*map(named_tokens, naming))
    documents = itertools.chain.from_iterable(map(stream_documents, sources))
    counts, read = count_tokens(tokenizer, documents, rows, progress)
    kept = choose_tokens(parts, counts, {token for token in named if token < rows}, size, multiple)
    occurring = int(counts.count_nonzero())
    if len(kept) == rows:
        raise AdaPrunerError(
            f"no token can be removed: {occurring:,} of the {rows:,} tokens occur in the text; choose a smaller"
            " `vocabulary_size`, or a text in fewer languages"
        )
    known = [token for token in parts.texts if token < rows]
    scripts = dict(zip(known, scripts_of(tokenizer, known), strict=True))
    before, after = Counter(scripts.values()), Counter(scripts[token] for token in kept if token in scripts)
    summary = VocabularySummary(
        before=rows,
        after=len(kept),
        occurring=occurring,
        counted_bytes=read,
        scripts={script: (count, after[script]) for script, count in before.most_common()},
        parameters_before=_parameters(config),
    )
    beyond = tuple(sorted(token for token in parts.texts if token >= rows))
    vocabulary = Vocabulary(kept=kept, beyond=beyond, summary=summary)
    left = _parameters(cut_config(config, vocabulary))
    return vocabulary.model_copy(update={"summary": summary.model_copy(update={"parameters_after": left})})


def _parameters(config: PreTrainedConfig) -> int:
    """The number of parameters of a config's model, tied ones counted once; for any family."""
    with torch.device("meta"):
        return count_parameters(new_model(config))
