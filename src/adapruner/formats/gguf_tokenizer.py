"""The tokenizer of a GGUF file: the metadata with which llama.cpp splits text into the same tokens."""

import json
from collections.abc import Iterator
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError

_Token = tuple[str, TokenType]  # text and kind

_SPACE = "▁"  # how SentencePiece writes a space
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA_3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN_2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

# llama.cpp knows pre-tokenizers only by name. A name stands for the steps that split text into words, and for a flag:
# True if a word that is a token is taken without merging.
_PRE_TOKENIZER_NAMES = {
    (("gpt-2 words", "bytes"), False): "gpt-2",
    (("digits", "gpt-2 words", "bytes"), False): "smollm",
    ((_LLAMA_3, "bytes"), True): "llama-bpe",
    ((_LLAMA_3, "bytes"), False): "smaug-bpe",
    ((_QWEN_2, "bytes"), False): "qwen2",
    ((_TEKKEN, "bytes"), True): "tekken",
}


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, vocabulary: int) -> None:
    """Writes tokens, merges or scores, special tokens and chat template into the metadata of a file.

    Two differences remain, which llama.cpp cannot express. It does not normalize text to NFC, as Qwen's tokenizer does.
    And it puts the space of SentencePiece in front of text even if the text begins with a space or follows a special
    token, as SentencePiece and older versions of transformers do, but `Metaspace` does not.

    Args:
        vocabulary: rows of the embedding; ids that the tokenizer does not use get a placeholder.
    """
    if not tokenizer.is_fast:
        raise _not_writable("it is not a fast tokenizer (one with a tokenizer.json)")
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _not_writable(f"its model is {model['type']}, or marks the ends of words")
    add = _add_sentencepiece_like if model["byte_fallback"] else _add_byte_level
    add(writer, definition, _tokens(definition, vocabulary))
    _add_special_tokens(writer, tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _not_writable(reason: str) -> AdaPrunerError:
    return AdaPrunerError(
        f"llama.cpp cannot read this tokenizer: {reason}; byte-level BPE of the kinds "
        f"{', '.join(_PRE_TOKENIZER_NAMES.values())} and BPE converted from SentencePiece can be exported,"
        " other models can only be saved as folders for transformers"
    )


def _add_byte_level(writer: GGUFWriter, definition: dict[str, Any], tokens: list[_Token]) -> None:
    """BPE over bytes that are written as letters, as in GPT-2, Llama 3 and Qwen."""
    model = definition["model"]
    if (definition["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _not_writable(f"it normalizes text by {definition['normalizer']['type']}")
    steps = tuple(_word_splitting_steps(definition["pre_tokenizer"]))
    name = _PRE_TOKENIZER_NAMES.get((steps, model["ignore_merges"]))
    if name is None:
        raise _not_writable(f"no name is known for the way it splits text: {', '.join(steps)}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])


def _word_splitting_steps(pre_tokenizer: dict[str, Any] | None) -> Iterator[str]:
    """The steps of a pre-tokenizer in order, with its regular expressions as they are."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": steps}:
            for step in steps:
                yield from _word_splitting_steps(step)
        case {"type": "Digits", "individual_digits": True}:
            yield "digits"
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
            yield expression
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": splits}:
            if splits:
                yield "gpt-2 words"
            yield "bytes"
        case _:
            yield json.dumps(pre_tokenizer)


def _add_sentencepiece_like(writer: GGUFWriter, definition: dict[str, Any], tokens: list[_Token]) -> None:
    """BPE over characters with bytes for unknown ones, as in Llama 2 and Mistral, whose tokenizer was SentencePiece.

    llama.cpp merges any two neighbours that form a token, the pair with the highest score first. That equals merging by
    rank if every way to split a token in two is a merge, as in all tokenizers converted from SentencePiece.
    """
    if not _BYTE_TOKENS.issubset(definition["model"]["vocab"]):
        raise _not_writable("it falls back to bytes, but not all 256 are tokens")
    merges = [(left, right) for left, right in definition["model"]["merges"]]
    normal, known = {text for text, kind in tokens if kind == TokenType.NORMAL}, set(merges)
    for text in normal:
        for left, right in ((text[:middle], text[middle:]) for middle in range(1, len(text))):
            if left in normal and right in normal and (left, right) not in known:
                raise _not_writable(f"it would not merge {left!r} and {right!r}, which llama.cpp does")
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([float(-ranks.get(text, 0)) for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_add_space_prefix(_prefixes_a_space(definition))


def _prefixes_a_space(definition: dict[str, object]) -> bool:
    """True if text gets a space in front; refuses a tokenizer that changes text in other ways than SentencePiece."""
    prepend = {"type": "Prepend", "prepend": _SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    # If all spaces are replaced, there is nothing left to split at.
    at_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    match definition["normalizer"], definition["pre_tokenizer"]:
        case normalizer, pre_tokenizer if normalizer == replace and pre_tokenizer == at_spaces:
            return False
        case {"type": "Sequence", "normalizers": normalizers}, None if normalizers == [prepend, replace]:
            return True
        case normalizer, None if normalizer == replace:
            return False
        case None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
            return bool(scheme != "never")
    raise _not_writable("it changes or splits text in more ways than SentencePiece does")


def _tokens(definition: dict[str, Any], vocabulary: int) -> list[_Token]:
    """Text and kind of every id below `vocabulary`."""
    falls_back = definition["model"]["byte_fallback"]
    tokens = {}
    for text, index in definition["model"]["vocab"].items():
        tokens[index] = (text, TokenType.BYTE if falls_back and text in _BYTE_TOKENS else TokenType.NORMAL)
    for added in definition["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if falls_back and added["content"] == definition["model"]["unk_token"]:
            kind = TokenType.UNKNOWN
        tokens[added["id"]] = (added["content"], kind)
    if (last := max(definition["model"]["vocab"].values())) >= vocabulary:  # added tokens beyond are left out
        raise _not_writable(f"it has {last + 1} tokens, the embedding of the model only {vocabulary}")
    return [tokens.get(index, (f"[PAD{index}]", TokenType.UNUSED)) for index in range(vocabulary)]


def _add_special_tokens(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token_id
    if end is None:
        raise _not_writable("it has no end-of-text token (eos_token), without which generation never ends")
    # Without a token for the beginning, llama.cpp would use the token with id 11.
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    writer.add_bos_token_id(begin)
    writer.add_eos_token_id(end)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)

    bare = tokenizer.encode("a", add_special_tokens=False)
    framed = tokenizer.encode("a")
    adds_begin, adds_end = framed[:1] == [begin], framed[-1:] == [end]
    if framed != [begin] * adds_begin + bare + [end] * adds_end:
        raise _not_writable(f"it frames text by other tokens than those for beginning and end: {framed}")
    writer.add_add_bos_token(adds_begin)
    writer.add_add_eos_token(adds_end)
