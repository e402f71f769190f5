"""How often a GGUF file is read: its tokens are a Python loop in the readers of others, seconds for each reading."""

import contextlib
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings, strategies as st
from packaging.version import Version
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.formats.gguf import write_gguf
from adapruner.model.config import check_header, load_config, refuse_what_is_not_read, without_tokens
from adapruner.model.loading import load_model, load_tokenizer
from adapruner.model.places import find_model
from adapruner.options import GgufType
from adapruner.report.card import base_licence
from run_helpers import byte_tokenizer


@pytest.fixture
def file(make_model, tmp_path):
    tokenizer = byte_tokenizer()
    model: PreTrainedModel = make_model("llama", vocab_size=len(tokenizer), attention_bias=False, mlp_bias=False)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "f32")
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("gguf_type", get_args(GgufType))
def test_what_was_written_is_loaded(gguf_type, file, make_model, tmp_path):
    """Rows are multiples of 32, as the types in blocks need them."""
    if "_k" in gguf_type:
        pytest.importorskip("cyllama")
    tokenizer = load_tokenizer(find_model(str(file)))
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 64}
    model = make_model("llama", 4, **sizes, attention_bias=False, mlp_bias=False)
    write_gguf(model, tokenizer, tmp_path / "other.gguf", gguf_type)
    tokens = torch.arange(3, 67).view(4, 16)
    with torch.no_grad():
        logits, expected = (each(tokens).logits for each in (adapruner.load(tmp_path / "other.gguf"), model))
    tolerance = 1e-5 if gguf_type == "f32" else 0.5
    assert (logits - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, "the scaling of its rotary"),
        ({"attention_bias": True}, "the biases"),
    ],
)
def test_what_would_be_lost_is_refused(fields, lost, file, make_model, tmp_path):
    tokenizer = load_tokenizer(find_model(str(file)))
    sizes = {"vocab_size": len(tokenizer), "attention_bias": False, "mlp_bias": False}
    write_gguf(make_model("llama", **sizes | fields), tokenizer, tmp_path / "other.gguf", "f32")
    with pytest.raises(AdaPrunerError, match=f"does not read {lost}"):
        load_config(find_model(str(tmp_path / "other.gguf")))


@pytest.mark.parametrize(
    ("tensors", "said", "is_refused"),
    [
        ([], {}, False),
        ([], {"type": "linear", "factor": 1.0}, False),
        ([], {"type": "none"}, False),
        ([], {"type": "yarn", "factor": 1.0}, True),
        (["rope_freqs.weight"], {}, True),
        (["rope_factors_long.weight"], {}, True),
    ],
)
def test_scaled_rotary_embeddings_are_recognised(tensors, said, is_refused):
    fields = {
        f"phi3.rope.scaling.{name}": SimpleNamespace(contents=lambda value=value: value) for name, value in said.items()
    }
    reader: Any = SimpleNamespace(tensors=[SimpleNamespace(name=name) for name in tensors], fields=fields)
    plain, scaled = (
        LlamaConfig(),
        LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    )
    with pytest.raises(AdaPrunerError, match="scaling") if is_refused else contextlib.nullcontext():
        refuse_what_is_not_read(reader, "file", plain, True)
    # Where transformers has read it, nothing is lost.
    refuse_what_is_not_read(reader, "file", scaled, True)


def test_a_run_reads_a_file_once_for_its_config_and_once_for_its_weights(file, monkeypatch):
    readings = []
    read = gguf.GGUFReader.__init__

    def count(reader: object, *arguments: object, **options: object) -> None:
        readings.append(arguments)
        read(reader, *arguments, **options)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", count)
    for _ in range(3):
        assert load_config(find_model(str(file))).hidden_size == 48
        tokenizer = load_tokenizer(find_model(str(file)))
    assert tokenizer.decode(tokenizer("some text").input_ids, skip_special_tokens=True) == "some text"
    model = load_model(find_model(str(file)))
    assert base_licence(find_model(str(file))) is None
    # Before 5.18, transformers reads the file for each tokenizer too.
    of_tokenizers = 3 if Version(transformers.__version__) < Version("5.18") else 0
    assert len(readings) == 2 + of_tokenizers
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


@pytest.fixture
def long_lists(tmp_path):
    """A file with lists of tokens that are stepped over, and a short one for each layer that is not."""
    writer = GGUFWriter(tmp_path / "long.gguf", "llama")
    writer.add_token_list([f"w{number}" * (number % 7) for number in range(5000)])
    writer.add_token_scores([-float(number) for number in range(5000)])
    writer.add_token_types([1] * 5000)
    writer.add_head_count_kv([2, 1])
    writer.add_block_count(2)
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "long.gguf"


def test_tokens_are_stepped_over(long_lists, monkeypatch):
    """All else is what the reader of gguf reads, and transformers counts the tokens."""
    whole = gguf.GGUFReader(long_lists)
    settings, _ = PreTrainedConfig.get_config_dict(long_lists.parent, gguf_file=long_lists.name)
    read: list[object] = []
    of_strings = gguf.GGUFReader._get_str
    monkeypatch.setattr(gguf.GGUFReader, "_get_str", lambda *place: read.append(place) or of_strings(*place))
    with without_tokens():
        short = gguf.GGUFReader(long_lists)
        again, _ = PreTrainedConfig.get_config_dict(long_lists.parent, gguf_file=long_lists.name)
    assert len(read) < 50
    assert again == settings
    assert again["vocab_size"] == 5000
    assert short.fields.keys() == whole.fields.keys()
    for name, field in whole.fields.items():
        if len(field.data) < 5000:
            assert short.fields[name].contents() == field.contents(), name
    for one, other in zip(short.tensors, whole.tensors, strict=True):
        assert (one.name, one.data_offset) == (other.name, other.data_offset)
        assert np.array_equal(one.data, other.data)


def test_a_list_that_is_longer_than_the_file_is_refused(long_lists):
    content = long_lists.read_bytes()
    assert content.count(struct.pack("<Q", 5000)) >= 3
    for count in (5001, 2**40, 2**63):
        long_lists.write_bytes(content.replace(struct.pack("<Q", 5000), struct.pack("<Q", count)))
        with pytest.raises(AdaPrunerError, match="cannot load"):
            load_config(find_model(str(long_lists)))


def test_the_licence_is_found_behind_other_fields(tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(["a", "", "ccc"])
    writer.add_token_scores([0.0, -1.0, -2.0])
    writer.add_bool("general.odd", True)
    writer.add_license("apache-2.0")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert base_licence(find_model(str(path))) == {"license": "apache-2.0"}
    content = path.read_bytes()
    for broken in (b"", content[:20], content[:60], content[:16] + struct.pack("<Q", 2**62) + content[24:60]):
        path.write_bytes(broken)
        assert base_licence(find_model(str(path))) is None


def packed_file(tensors: list[tuple[str, tuple[int, ...], int, int]], fields: bytes = b"", data: int = 64) -> bytes:
    """A GGUF file with these tensors (name, shape, type, offset), one field at most, and so many bytes of data."""
    content = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 1 if fields else 0) + fields
    for name, shape, kind, offset in tensors:
        content += struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        content += struct.pack("<IQ", kind, offset)
    return content + bytes(-len(content) % 32 + data)


def packed_field(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


F32 = 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (packed_file([("a", (8, 2), F32, 0)]), None),
        (packed_file([("a", (8,), F32, 0), ("b", (8,), F32, 32)]), None),
        (packed_file([("a", (8,), F32, 0), ("b", (8,), F32, 16)]), "'b' shares bytes with another"),
        (packed_file([("a", (8,), F32, 0), ("a", (8,), F32, 32)]), "two tensors have the same name"),
        (packed_file([("a", (17,), F32, 0)]), "its tensors need 132 bytes, and it has 128"),
        (packed_file([("a", (2**32, 2**32), F32, 0)]), "its tensors need 73,786,976,294,838,206,560 bytes"),
        (packed_file([("a", (1,), F32, 2**64 - 1)]), "its tensors need"),
        (packed_file([("a", (1,) * 5, F32, 0)]), "it says 5 dimensions, more than 4"),
        (packed_file([("a", (1,), 99, 0)]), "99 is not a valid GGMLQuantizationType"),
        (packed_file([("a", (8,), F32, 0)])[:40], "it ends within its header"),
        (packed_file([], packed_field("general.alignment", 4, bytes(4))), "its alignment is 0"),
        (packed_file([], packed_field("a", 9, struct.pack("<IQIQ", 9, 1, 4, 0))), "it has a list of lists"),
        (packed_file([], packed_field("a", 9, struct.pack("<IQ", 0, 2**40))), "it says 1,099,511,627,776 entries"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**40, 0), "it says 1,099,511,627,776 tensors"),
        (b"GGML" + bytes(20), "it does not begin as a GGUF file"),
        (b"", "cannot mmap an empty file"),
    ],
)
def test_a_header_says_what_the_file_holds(content, message, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        check_header(path)


def test_a_file_with_fewer_weights_than_its_model_is_refused(file):
    """Transformers would allocate those that do not fit, and fill them at random."""
    wide = packed_field("llama.feed_forward_length", 4, struct.pack("<I", 2**20))
    narrow = packed_field("llama.feed_forward_length", 4, struct.pack("<I", 24))
    content = file.read_bytes()
    assert content.count(narrow) == 1
    file.write_bytes(content.replace(narrow, wide))
    with pytest.raises(
        AdaPrunerError, match=r"holds \d+,\d+ weights, and its metadata describe a model of 604,\d+,\d+"
    ):
        load_config(find_model(str(file)))


def test_a_family_that_transformers_reads_without_gguf_is_checked_too(file, monkeypatch):
    fields, _ = PreTrainedConfig.get_config_dict(file.parent, gguf_file=file.name)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda *_, **__: (fields, {}))
    assert load_config(find_model(str(file))).hidden_size == 48


SIZES = ("embedding_length", "block_count", "feed_forward_length", "context_length", "vocab_size")
SIZES_OF_ATTENTION = ("attention.head_count", "attention.head_count_kv", "attention.key_length", "rope.dimension_count")


def load_or_refuse(path: Path) -> str:
    """The message that refuses a file, empty if it is loaded."""
    location = find_model(str(path))
    try:
        base_licence(location)
        load_config(location)
        load_tokenizer(location)
        load_model(location)(torch.tensor([[2, 3]]))
    except AdaPrunerError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", SIZES + SIZES_OF_ATTENTION)
def test_a_size_of_zero_gives_no_warning(name, file):
    content, field = file.read_bytes(), f"llama.{name}".encode() + struct.pack("<I", 4)
    assert content.count(field) == 1
    place = content.index(field) + len(field)
    file.write_bytes(content[:place] + bytes(4) + content[place + 4 :])
    assert "\n" not in load_or_refuse(file)


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_a_damaged_file_is_loaded_or_refused_in_one_line(file, data):
    """Bytes of its header are replaced, or its end is missing."""
    healthy = file.read_bytes()
    damaged = bytearray(healthy)
    first_tensor = healthy.index(b"output_norm.weight") - 1000
    for place in data.draw(st.lists(st.integers(4, 23) | st.integers(first_tensor, first_tensor + 3000), max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))
    path = file.with_name("damaged.gguf")
    path.write_bytes(damaged[:end])
    message = load_or_refuse(path)
    assert "\n" not in message
    assert not message or path.read_bytes() != healthy
