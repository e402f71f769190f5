"""From texts to the tokens that a model keeps, and cutting its embeddings and configs."""

import copy
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.model.architecture import new_model
from adapruner.model.config import find_wrapper
from adapruner.model.places import ModelLocation, quiet_transformers
from adapruner.model.wrapper import give_wrapper, wrapper_of
from adapruner.structure.blocks import count_parameters
from adapruner.text.reading import stream_documents
from adapruner.text.sources import Source
from adapruner.text.windows import tokens_of
from adapruner.tokens.tokenizer import TokenizerParts

# Fields of configs that hold a token, or lists of them.
_TOKENS = re.compile(
    r".*_token_(id|ids|index)|(begin_)?suppress_tokens|bad_words_ids|force_words_ids|forced_(bos|eos)_token_id"
)
# Fields that hold tokens in forms that are not renumbered.
_NOT_REWRITABLE = ("sequence_bias", "forced_decoder_ids", "constraints")
_SIZES = re.compile(r"(.*_)?vocab_size(_.*)?")


@dataclass(frozen=True)
class Vocabulary:
    """The kept tokens.

    Attributes:
        kept: their ids, ascending; the new id of a token is its place in this list.
        beyond: ids of added tokens that have no row in the embedding, ascending; their new ids follow those of the kept
            tokens.
    """

    kept: tuple[int, ...]
    beyond: tuple[int, ...] = ()

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """The new ids, by old id."""
        return {old: new for new, old in enumerate((*self.kept, *self.beyond))}


def named_tokens(settings: PreTrainedConfig | GenerationConfig) -> set[int]:
    """The tokens that a config names: for beginning, end and padding, suppressed ones, and so on. Refuses a field that
    names tokens in a form that cannot be renumbered."""
    for name in _NOT_REWRITABLE:
        if getattr(settings, name, None):
            raise AdaPrunerError(f"the config of the model sets {name}, whose tokens cannot be renumbered: remove it")
    return {token for _, _, value in _token_fields(settings) for token in _numbers(value) if token >= 0}


def configs_with_tokens(
    location: ModelLocation, config: PreTrainedConfig
) -> tuple[PreTrainedConfig | GenerationConfig, ...]:
    """The configs that name tokens: of the model, or the multimodal model around it, and its generation config, from
    its own file or else from its config; reads no weights."""
    wrapper = find_wrapper(location)
    around = wrapper.config if wrapper else config
    if location.gguf_file is None:
        try:
            with quiet_transformers():
                return around, GenerationConfig.from_pretrained(location.path)
        except OSError:  # there is no such file
            pass
    return around, GenerationConfig.from_model_config(config)


def cut_config(config: PreTrainedConfig, vocabulary: Vocabulary) -> PreTrainedConfig:
    """A copy of a config for the smaller vocabulary, with the new tokens and sizes, also those of further tables."""
    cut = copy.deepcopy(config)
    _renumber(cut, vocabulary)
    # Other models inside a multimodal one have vocabularies of their own.
    for settings in {id(settings): settings for settings in (cut, cut.get_text_config(decoder=True))}.values():
        for name, rows in vars(settings).items():
            if _SIZES.fullmatch(name) and isinstance(rows, int) and rows > 0:
                setattr(settings, name, sum(token < rows for token in vocabulary.kept))
    return cut


def _renumber(settings: PreTrainedConfig | GenerationConfig, vocabulary: Vocabulary) -> None:
    """Gives the tokens that a config names their new numbers, in place."""
    for config, name, value in list(_token_fields(settings)):
        setattr(config, name, _renumbered(value, vocabulary))


def cut_vocabulary(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Removes the rows of all other tokens from a model, in place: of embeddings, output layer and bias, tied or not.

    The tensors with rows for tokens are those whose shape changes with the size of the vocabulary in the config."""
    config = cut_config(model.config, vocabulary)
    with torch.device("meta"):
        smaller = new_model(config)
    # Several modules share a tied weight.
    done: dict[int, nn.Parameter | Tensor] = {}
    kept = torch.tensor(vocabulary.kept)
    for path, module in model.named_modules():
        cut = smaller.get_submodule(path)
        for tensors, cut_tensors in ((module._parameters, cut._parameters), (module._buffers, cut._buffers)):
            for name, tensor in tensors.items():
                wanted = cut_tensors.get(name)
                if tensor is None or wanted is None or tensor.shape == wanted.shape:
                    continue
                if id(tensor) not in done:
                    done[id(tensor)] = _cut_rows(f"{path}.{name}", tensor, wanted, kept)
                tensors[name] = done[id(tensor)]
        # Counts that modules have in addition to the config, as `num_embeddings`.
        for name, count in vars(cut).items():
            if type(count) is int and vars(module).get(name) != count:
                setattr(module, name, count)
    model.config.__dict__.update(config.__dict__)
    _renumber(model.generation_config, vocabulary)
    if wrapper := wrapper_of(model):
        give_wrapper(model, replace(wrapper, config=cut_config(wrapper.config, vocabulary)))
    model.tie_weights()


def _cut_rows(name: str, tensor: Tensor, wanted: Tensor, kept: Tensor) -> Tensor:
    differing = [axis for axis, size in enumerate(tensor.shape) if size != wanted.shape[axis]]
    rows = kept[kept < tensor.shape[differing[0]]]
    if len(differing) != 1 or len(rows) != wanted.shape[differing[0]] or tensor.is_meta:
        raise AdaPrunerError(
            f"{name} changes from {tuple(tensor.shape)} to {tuple(wanted.shape)} with the vocabulary, not by a row for"
            " each token: the vocabulary of this model cannot be pruned"
        )
    cut = tensor.detach().index_select(differing[0], rows.to(tensor.device))
    return nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut


def _token_fields(settings: object) -> Iterator[tuple[object, str, object]]:
    """The config, name and value of every field that holds tokens, in a config and those inside it."""
    for name, value in vars(settings).items():
        if isinstance(value, PreTrainedConfig):
            yield from _token_fields(value)
        elif _TOKENS.fullmatch(name) and value is not None:
            yield settings, name, value


def _numbers(value: object) -> Iterator[int]:
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, int):
        yield value


def _renumbered(value: Any, vocabulary: Vocabulary) -> Any:
    """Numbers that are not tokens, as -1, are left unchanged."""
    if isinstance(value, list | tuple):
        return [_renumbered(entry, vocabulary) for entry in value]
    return vocabulary.new_ids.get(value, value)


# Characters that are encoded at once: long enough that its ends do not matter, short enough for any memory.
_CHARACTERS_AT_ONCE = 1 << 17


class VocabularySummary(BaseModel, extra="forbid", frozen=True):
    """The outcome of pruning a vocabulary.

    Attributes:
        before, after: the number of tokens, which is that of the rows of the embedding.
        occurring: the number of different tokens in the text.
        counted_bytes: the length of the text in UTF-8.
        scripts: the number of tokens before and after, by script.
        parameters_before, parameters_after: of the model, tied ones counted once, before anything else is removed.
    """

    before: int
    after: int
    occurring: int
    counted_bytes: int
    scripts: dict[str, tuple[int, int]]
    parameters_before: int
    parameters_after: int

    @property
    def removed_parameters(self) -> int:
        return self.parameters_before - self.parameters_after

    @property
    def removed_share(self) -> float:
        """The fraction of the parameters that the removed tokens had."""
        return self.removed_parameters / self.parameters_before

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        return (
            f"{self.after:,} of {self.before:,} tokens were kept: the most likely by"
            f" {self.counted_bytes / 1e6:,.1f} MB of text, in which {self.occurring:,} occur, what they are merged"
            " from, bytes, and special tokens."
        )


class FewerTokens(BaseModel, extra="forbid", frozen=True):
    """The tokens that a model keeps."""

    vocabulary: Vocabulary
    summary: VocabularySummary


def fewer_tokens(
    location: ModelLocation,
    config: PreTrainedConfig,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    size: int | None,
    multiple: int,
    progress: Callable[[int], None] | None = None,
) -> FewerTokens:
    """Counts the tokens of texts and chooses the tokens that a model keeps; reads no weights.

    Args:
        size, multiple: see `choose_tokens`.
        progress: called with the number of documents read.
    """
    parts, rows = TokenizerParts.of(tokenizer), config.get_text_config().vocab_size
    named = set[int]().union(*map(named_tokens, configs_with_tokens(location, config)))
    counted = [count_tokens(tokenizer, stream_documents(source), rows, progress) for source in sources]
    # Every dataset counts as much as any other.
    frequencies = torch.stack([counts.double() / counts.sum() for counts, _ in counted]).mean(0)
    known = [token for token in parts.texts if token < rows]
    texts = dict(zip(known, tokenizer.batch_decode([[token] for token in known]), strict=True))
    likely = frequencies if size is None else likely_tokens(frequencies, texts)
    kept = choose_tokens(parts, likely, {token for token in named if token < rows}, size, multiple)
    occurring = int(frequencies.count_nonzero())
    if len(kept) == rows:
        raise AdaPrunerError(
            f"no token can be removed: {occurring:,} of the {rows:,} tokens occur in the text; choose a smaller"
            " `vocabulary_size`, or a text in fewer languages"
        )
    # The script of a token is that of its first letter; parts of characters have none.
    letters = ([unicodedata.name(sign, "") for sign in text if sign.isalpha()] for text in texts.values())
    of_texts = [next(filter(None, own), "OTHER").partition(" ")[0] for own in letters]
    scripts = dict(zip(texts, of_texts, strict=True))
    before, after = Counter(scripts.values()), Counter(scripts[token] for token in kept if token in scripts)
    vocabulary = Vocabulary(kept=kept, beyond=tuple(sorted(token for token in parts.texts if token >= rows)))
    with torch.device("meta"):
        parameters = [count_parameters(new_model(of)) for of in (config, cut_config(config, vocabulary))]
    summary = VocabularySummary(
        before=rows,
        after=len(kept),
        occurring=occurring,
        counted_bytes=sum(read for _, read in counted),
        scripts={script: (count, after[script]) for script, count in before.most_common()},
        parameters_before=parameters[0],
        parameters_after=parameters[1],
    )
    return FewerTokens(vocabulary=vocabulary, summary=summary)


def count_tokens(
    tokenizer: Tokenizer, documents: Iterable[str], size: int, progress: Callable[[int], None] | None = None
) -> tuple[Tensor, int]:
    """The frequency of each token in text. Documents are joined by an empty line, as in evaluations.

    Args:
        size: only smaller ids are counted.
        progress: called with the number of documents read.

    Returns:
        [size], int64; and the bytes of the text in UTF-8.
    """
    counts, read = torch.zeros(size, dtype=torch.int64), 0
    for text, number in _chunks(documents):
        tokens = tokens_of(tokenizer, text)
        counts += torch.bincount(tokens[tokens < size], minlength=size)
        read += len(text.encode())
        if progress:
            progress(number)
    return counts, read


def _chunks(documents: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Documents joined until they are long enough, with their number."""
    joined: list[str] = []
    length = 0
    for document in documents:
        joined.append(document)
        length += len(document)
        if length >= _CHARACTERS_AT_ONCE:
            yield "\n\n".join(joined) + "\n\n", len(joined)
            joined, length = [], 0
    if joined:
        yield "\n\n".join(joined), len(joined)


# Additive smoothing: the weight of the prior, and the first ids, which are about equally frequent. Other text has the
# fewest tokens with these, on two tokenizers (research/results.md).
_UNSEEN, _ALIKE = 0.25, 1000
# The least frequency of a token whose characters the text is written in.
_LEAST_FREQUENCY = 1e-6


def likely_tokens(frequencies: Tensor, texts: Mapping[int, str]) -> Tensor:
    """The frequency of each token that is to be expected in other text like the counted one: that in the counted text,
    smoothed by a Zipf prior over the tokens of the same characters, ranked by id, since training a tokenizer finds
    frequent tokens first.

    Args:
        frequencies: [rows of the embedding], float64: in the counted text; they add up to 1.
        texts: what each token writes.

    Returns:
        [rows of the embedding], float64; they add up to 1.
    """
    frequent = (frequencies >= _LEAST_FREQUENCY).nonzero().flatten().tolist()
    characters = set("".join(texts.get(token, "") for token in frequent)) - {"\N{REPLACEMENT CHARACTER}"}
    unseen = torch.tensor(
        [token in texts and characters.issuperset(texts[token]) for token in range(len(frequencies))],
        dtype=torch.float64,
    ) / torch.arange(_ALIKE, _ALIKE + len(frequencies))
    return (1 - _UNSEEN) * frequencies + _UNSEEN * unseen / unseen.sum().clamp(min=1e-300)


def choose_tokens(
    parts: TokenizerParts, frequencies: Tensor, named: Iterable[int], size: int | None = None, multiple: int = 64
) -> tuple[int, ...]:
    """The most frequent tokens, the tokens that they are merged from, and the tokens that every text needs; ascending.

    Rounding up adds tokens that the text does not have, smallest ids first: training the tokenizer found these first.

    Args:
        frequencies: [rows of the embedding]: of each token, see `count_tokens` and `likely_tokens`.
        named: tokens that configs name.
        size: the largest number of kept tokens, rounded up; by default, all with a frequency above zero.
        multiple: the number of kept tokens is rounded up to a multiple of this, if there are enough tokens.
    """
    rows = len(frequencies)
    chosen: set[int] = set()
    for token in parts.required | set(named):
        chosen |= {ancestor for ancestor in parts.with_ancestors(token) if ancestor < rows}
    if size is not None and size < len(chosen):
        raise AdaPrunerError(
            f"`vocabulary_size` {size:,} is less than the {len(chosen):,} tokens that must be kept (special and added"
            " tokens, bytes or characters, and what these are merged from): choose at least that"
        )
    most = rows if size is None else _rounded_up(size, multiple)
    occurring = frequencies.nonzero().flatten()
    by_frequency = occurring[frequencies[occurring].argsort(descending=True, stable=True)].tolist()
    _take(chosen, by_frequency, parts, most)
    _take(chosen, sorted(index for index in parts.texts if index < rows), parts, _rounded_up(len(chosen), multiple))
    unused = [row for row in range(max(parts.texts) + 1, rows) if row not in chosen]
    return tuple(sorted(chosen.union(unused[: min(_rounded_up(len(chosen), multiple), rows) - len(chosen)])))


def _take(chosen: set[int], tokens: Iterable[int], parts: TokenizerParts, most: int) -> None:
    """Adds tokens with those that they are merged from, up to a number; a token that does not fit is skipped."""
    for token in tokens:
        if len(chosen) >= most:
            return
        added = parts.with_ancestors(token) - chosen
        if len(chosen) + len(added) <= most:
            chosen |= added


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
