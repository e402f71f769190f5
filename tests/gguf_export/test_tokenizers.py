"""Tokenizers in GGUF files: llama.cpp must cut text into the same tokens as the tokenizer at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN_2
from transformers.tokenization_utils_base import generate_merges

from adapruner.base.errors import AdaPrunerError
from adapruner.formats.gguf import write_gguf
from adapruner.tokens.model import choose_tokens, count_tokens
from adapruner.tokens.tokenizer import TokenizerParts, cut_tokenizer

LLAMA_3 = TikTokenConverter().pattern
# As in the tokenizer.json of Mistral-Nemo.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)

MakeModel = Callable[..., PreTrainedModel]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
LlamaCpp = Callable[[Path], Any]


def split_by(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(expression), "isolated")


def sentencepiece_vocabulary(covered: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges as transformers makes them of a SentencePiece model: every way to split a piece is a merge."""
    letters = sorted({letter for letter in "".join(covered) if letter.isascii() and letter.isprintable()} - {" "})
    words = ["▁The", "▁the", "▁capital", "▁of", "▁France", "▁is", "▁and", "day", "▁▁", "turn", "use", "text"]
    pieces = {word[:end] for word in words for end in range(2, len(word) + 1)}
    pieces |= {word[start:] for word in words for start in range(1, len(word) - 1)}
    ordered = sorted(pieces, key=lambda piece: (len(piece), piece[::-1]))
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *ordered, "▁", *letters]
    vocabulary = {text: index for index, text in enumerate(texts)}
    return vocabulary, generate_merges(vocabulary, skip_tokens=texts[:3])


SPACES = normalizers.Replace(" ", "▁")
PREFIX_AND_SPACES = normalizers.Sequence([normalizers.Prepend("▁"), SPACES])


@pytest.fixture
def sentencepiece_like(texts, with_special_tokens):
    def make(
        normalizer: normalizers.Normalizer | None, pre_tokenizer: pre_tokenizers.PreTokenizer | None = None
    ) -> PreTrainedTokenizerFast:
        vocabulary, merges = sentencepiece_vocabulary(texts)
        backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return with_special_tokens(backend)

    return make


@pytest.fixture
def assert_cut_the_same(tiny, llama_cpp, tmp_path):
    def check(tokenizer: PreTrainedTokenizerFast, texts: list[str], kind: str, name: str) -> None:
        tokenizer.chat_template = "{{ messages[0].content }}"
        path = tmp_path / "model.gguf"
        write_gguf(tiny("qwen3", vocab_size=600, num_hidden_layers=1), tokenizer, path, "f32")
        fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
        assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == (kind, name)
        assert fields["tokenizer.chat_template"] == tokenizer.chat_template
        assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
        opened = llama_cpp(path)
        for text in texts:
            assert opened.tokenize(text) == tokenizer.encode(text), text

    return check


@pytest.fixture
def assert_refused(tiny, tmp_path):
    def check(tokenizer: PreTrainedTokenizerFast, message: str, **fields: object) -> None:
        with pytest.raises(AdaPrunerError, match=message) as refusal:
            write_gguf(tiny(**fields), tokenizer, tmp_path / "model.gguf")
        assert "\n" not in str(refusal.value)
        assert not list(tmp_path.iterdir())

    return check


@pytest.mark.parametrize(
    ("name", "steps", "ignore_merges"),
    [
        ("gpt-2", [GPT_2], False),
        ("smollm", [DIGITS, GPT_2], False),
        ("llama-bpe", [split_by(LLAMA_3), BYTES], True),
        ("smaug-bpe", [split_by(LLAMA_3), BYTES], False),
        ("qwen2", [split_by(QWEN_2), BYTES], False),
        ("tekken", [split_by(TEKKEN), BYTES], True),
    ],
)
def test_byte_level(name, steps, ignore_merges, texts, byte_level, assert_cut_the_same):
    assert_cut_the_same(byte_level(*steps, ignore_merges=ignore_merges), texts, "gpt2", name)


def test_added_tokens_beyond_the_embedding_are_left_out(texts, byte_level, assert_cut_the_same):
    tokenizer = byte_level(GPT_2)
    tokenizer.add_tokens([f"<extra {number}>" for number in range(601 - len(tokenizer))])
    assert_cut_the_same(tokenizer, texts, "gpt2", "gpt-2")


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [(PREFIX_AND_SPACES, None), (SPACES, None), (None, pre_tokenizers.Metaspace("▁", "never", split=False))],
)
def test_sentencepiece_like(normalizer, pre_tokenizer, texts, sentencepiece_like, assert_cut_the_same):
    assert_cut_the_same(sentencepiece_like(normalizer, pre_tokenizer), texts, "llama", "default")


def test_the_llama_tokenizer_of_transformers(texts, assert_cut_the_same):
    """In front of text that begins with a space or follows a special token it writes no further space, while llama.cpp
    and SentencePiece do."""
    tokenizer = LlamaTokenizer(*sentencepiece_vocabulary(texts), add_bos_token=True)
    assert_cut_the_same(tokenizer, [text for text in texts if text[0] not in " <"], "llama", "default")


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "message"),
    [([pre_tokenizers.Punctuation(), BYTES], False, "Punctuation"), ([GPT_2], True, "no name is known")],
)
def test_refused_ways_to_split(steps, ignore_merges, message, byte_level, assert_refused):
    assert_refused(byte_level(*steps, ignore_merges=ignore_merges), message)


def test_refused_kinds(tokenizer, bytes_tokenizer, sentencepiece_like, assert_refused):
    assert_refused(tokenizer, "its model is WordLevel")
    assert_refused(bytes_tokenizer, "the embedding of the model only 300", vocab_size=300)
    splitting = pre_tokenizers.Metaspace("▁", "always")
    assert_refused(sentencepiece_like(normalizers.NFKC()), "more ways than SentencePiece", vocab_size=600)
    assert_refused(sentencepiece_like(None, splitting), "more ways than SentencePiece", vocab_size=600)


def test_refused_special_tokens(byte_level, assert_refused):
    without_end = byte_level()
    without_end.eos_token = None
    assert_refused(without_end, "no end-of-text token")

    framed_by_padding = byte_level()
    framed_by_padding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", framed_by_padding.pad_token_id)]
    )
    assert_refused(framed_by_padding, "frames text")


def test_refused_merges(with_special_tokens, assert_refused):
    """One merge per token, where SentencePiece would merge any two pieces that form one."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc", "ab", "bc", "abc"]
    vocabulary = {text: index for index, text in enumerate(pieces)}
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = PREFIX_AND_SPACES
    assert_refused(with_special_tokens(backend), "would not merge 'a' and 'bc'")


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_a_tokenizer_with_fewer_tokens(kind, texts, byte_level, sentencepiece_like, assert_cut_the_same):
    whole = byte_level() if kind == "bytes" else sentencepiece_like(SPACES)
    if kind == "characters":
        whole.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    parts, rows = TokenizerParts.of(whole), len(whole)
    counts, _ = count_tokens(whole, texts[:1], rows)
    kept = choose_tokens(parts, counts, (), multiple=1)
    assert len(kept) < rows
    fewer = cut_tokenizer(whole, {old: new for new, old in enumerate(kept)})
    assert_cut_the_same(fewer, texts, *(("gpt2", "gpt-2") if kind == "bytes" else ("llama", "default")))
