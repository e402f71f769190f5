"""Model folders and GGUF files that are broken or not what they seem."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from huggingface_hub import constants
from huggingface_hub.utils import logging
from safetensors.torch import load_file, save_file

from adapruner.errors import AdaPrunerError
from adapruner.models import check_length, find_model, load_model

VERBS = ("prune", "recover", "evaluate", "benchmark", "export", "inspect")
# These read weights.
READING = ("prune", "recover", "evaluate", "benchmark", "export")

Commands = Callable[[str | Path], dict[str, list[str]]]
Refused = Callable[..., str]


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    """A good model, to be broken."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


BROKEN_CONFIGS = {
    "empty": b"",
    "cut off": b'{"model_type": "llama", "hidden_si',
    "no object": b"[1, 2]",
    "a word": b'"llama"',
    "null": b"null",
    "binary": bytes(range(256)),
    "utf-16": '{"model_type": "llama"}'.encode("utf-16"),
    "no type": b"{}",
    "another type of type": b'{"model_type": 7}',
    "a list as type": b'{"model_type": ["llama"]}',
    "an unknown type": b'{"model_type": "lama"}',
    "control characters": b'{"model_type": "\\u001b[2J\\n\\nllama"}',
    "endless nesting": b'{"a":' * 100_000,
    "a long number": b'{"model_type": "llama", "hidden_size": ' + b"9" * 10_000 + b"}",
}


# All verbs read a model by the same way: the cases take turns.
@pytest.mark.parametrize(
    ("content", "verb"),
    list(zip(BROKEN_CONFIGS.values(), itertools.cycle(VERBS), strict=False)),
    ids=BROKEN_CONFIGS.keys(),
)
def test_configs_that_are_none(content: bytes, verb: str, copy: Path, commands: Commands, refused: Refused) -> None:
    (copy / "config.json").write_bytes(content)
    refused(commands(copy)[verb])


IMPOSSIBLE: list[dict[str, Any]] = [
    {"num_hidden_layers": 0},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 4.5},
    {"num_hidden_layers": "four"},
    {"num_hidden_layers": None},
    {"num_hidden_layers": True},
    {"hidden_size": 0},
    {"hidden_size": -48},
    {"hidden_size": 10**30},
    {"hidden_size": float("nan")},
    {"hidden_size": [48]},
    {"hidden_size": 64},
    {"vocab_size": 0},
    {"vocab_size": -1},
    {"vocab_size": 10**12},
    {"vocab_size": "many"},
    {"vocab_size": 95},
    {"num_attention_heads": 0},
    {"num_attention_heads": -6},
    {"num_attention_heads": 7},
    {"num_attention_heads": "6"},
    {"num_attention_heads": 10**9},
    {"num_key_value_heads": 0},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": -3},
    {"head_dim": 0},
    {"head_dim": -8},
    {"head_dim": "wide"},
    {"head_dim": 7},
    {"intermediate_size": 0},
    {"intermediate_size": -24},
    {"intermediate_size": 10**18},
    {"intermediate_size": None},
    {"hidden_act": "magic"},
    {"rms_norm_eps": "small"},
    {"dtype": "float99"},
    {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
    {"rope_parameters": "none"},
    {"layer_types": ["full_attention"]},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"quantization_config": "yes"},
    {"model_type": "gpt2"},
    {"model_type": "mixtral", "num_local_experts": 8},
    {"model_type": "t5"},
    {"model_type": "mamba"},
    {"model_type": "clip"},
    {"per_layer_config": {"1": {"intermediate_size": 0}}},
    {"per_layer_config": {"1": {"intermediate_size": -5}}},
    {"per_layer_config": {"1": {"num_attention_heads": "two"}}},
    {"per_layer_config": {"99": {"intermediate_size": 5}}},
    {"per_layer_config": {"one": {"intermediate_size": 5}}},
    {"per_layer_config": [1, 2]},
    {"per_layer_config": "all"},
    {"per_layer_config": {"1": {"intermediate_size": 23}}},
    {"per_layer_config": {"1": {"no_such_field": 23}}},
]


@pytest.mark.parametrize("fields", IMPOSSIBLE, ids=lambda fields: json.dumps(fields)[:60])
def test_configs_that_make_no_model(fields: dict[str, Any], copy: Path, commands: Commands, refused: Refused) -> None:
    change_config(copy, **fields)
    refused(commands(copy)["evaluate"])
    refused(commands(copy)["export"])


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes behind it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, rest: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


def break_header(path: Path, change: Callable[[dict[str, Any], str], None]) -> bytes:
    header, rest = header_of(path)
    change(header, next(name for name in header if name.endswith("q_proj.weight")))
    return with_header(header, rest)


def shift(header: dict[str, Any], name: str) -> None:
    header[name]["data_offsets"] = [offset + 4 for offset in header[name]["data_offsets"]]


def beyond(header: dict[str, Any], name: str) -> None:
    header[name]["data_offsets"] = [2**62, 2**63]


def negative(header: dict[str, Any], name: str) -> None:
    header[name]["data_offsets"] = [-8, 0]


def larger(header: dict[str, Any], name: str) -> None:
    header[name]["shape"] = [2**40, 2**40]


def other_dtype(header: dict[str, Any], name: str) -> None:
    header[name]["dtype"] = "F77"


def turned(header: dict[str, Any], name: str) -> None:
    header[name]["shape"] = [24, 96]


BROKEN_WEIGHTS: dict[str, Callable[[Path], bytes]] = {
    "nothing": lambda path: b"",
    "a header cut off": lambda path: path.read_bytes()[:100],
    "data cut off": lambda path: path.read_bytes()[:-100],
    "more behind the data": lambda path: path.read_bytes() + b"more",
    "text": lambda path: b"these are no weights",
    "a pickle": lambda path: b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}\x94.",
    "an endless header": lambda path: with_header({}, b"", 2**63),
    "a long header": lambda path: with_header({}, b"", 10**8),
    "no JSON": lambda path: struct.pack("<Q", 5) + b"{{{{{",
    "shifted": lambda path: break_header(path, shift),
    "beyond the end": lambda path: break_header(path, beyond),
    "before the beginning": lambda path: break_header(path, negative),
    "too large": lambda path: break_header(path, larger),
    "an unknown dtype": lambda path: break_header(path, other_dtype),
    "another shape": lambda path: break_header(path, turned),
    "a list": lambda path: with_header([1], b""),
}


@pytest.mark.parametrize("verb", READING)
@pytest.mark.parametrize("broken", BROKEN_WEIGHTS.values(), ids=BROKEN_WEIGHTS.keys())
def test_weights_that_are_none(
    broken: Callable[[Path], bytes], verb: str, copy: Path, commands: Commands, refused: Refused
) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(broken(path))
    refused(commands(copy)[verb], str(copy))
    if verb == "prune":
        shutil.rmtree(copy.parent / "output")
        refused([*commands(copy)[verb], "--layer-wise"], str(copy))


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {own: tensors[own] for own in tensors if name not in own}


OTHER_TENSORS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "none at all": lambda tensors: {},
    "no embedding": without("embed_tokens"),
    "a layer too few": without("layers.3."),
    "no query": without("layers.1.self_attn.q_proj.weight"),
    "a layer too many": lambda tensors: tensors | {"model.layers.4.mlp.up_proj.weight": torch.zeros(24, 48)},
    "narrower": lambda tensors: {name: tensor[:-1] for name, tensor in tensors.items()},
    "numbers in place of matrices": lambda tensors: {name: torch.tensor(1.0) for name in tensors},
    "whole numbers": lambda tensors: {name: tensor.to(torch.int32) for name, tensor in tensors.items()},
    "whole numbers of a byte": lambda tensors: {name: tensor.to(torch.uint8) for name, tensor in tensors.items()},
    "complex numbers": lambda tensors: {name: tensor.to(torch.complex64) for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("verb", READING)
@pytest.mark.parametrize("change", OTHER_TENSORS.values(), ids=OTHER_TENSORS.keys())
def test_weights_of_another_model(
    change: Callable[[dict[str, Any]], dict[str, Any]], verb: str, copy: Path, commands: Commands, refused: Refused
) -> None:
    path = copy / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    refused(commands(copy)[verb], str(copy))
    if verb == "prune":
        shutil.rmtree(copy.parent / "output")
        refused([*commands(copy)[verb], "--layer-wise"], str(copy))


@pytest.mark.parametrize("verb", ["prune", "recover", "evaluate"])
def test_weights_that_are_no_numbers(verb: str, copy: Path, commands: Commands, refused: Refused) -> None:
    path = copy / "model.safetensors"
    save_file({name: tensor.fill_(torch.nan) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    refused(commands(copy)[verb], "dtype" if verb == "prune" else "n")


def test_a_config_that_asks_for_more_than_memory_holds(copy: Path, commands: Commands, refused: Refused) -> None:
    """Nothing is allocated for weights that are not in the files."""
    change_config(copy, vocab_size=2**30)
    for verb in READING:
        refused(commands(copy)[verb])
    change_config(copy, vocab_size=96, num_hidden_layers=300)
    refused(commands(copy)["evaluate"], "is missing")


@pytest.mark.parametrize("verb", READING)
def test_no_weights(verb: str, copy: Path, commands: Commands, refused: Refused) -> None:
    (copy / "model.safetensors").unlink()
    refused(commands(copy)[verb], str(copy))


BROKEN_INDEXES: dict[str, Any] = {
    "a list": [],
    "no map": {"metadata": {}},
    "no metadata": {"weight_map": {"a": "model-1.safetensors"}},
    "a list as map": {"metadata": {}, "weight_map": ["model-1.safetensors"]},
    "an empty map": {"metadata": {}, "weight_map": {}},
    "numbers": {"metadata": {}, "weight_map": {"a": 1}},
    "a missing shard": {"metadata": {}, "weight_map": {"a": "model-7.safetensors"}},
    "a folder above": {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}},
    "a pickle": {"metadata": {}, "weight_map": {"a": "model.bin"}},
}


@pytest.mark.parametrize("verb", READING)
@pytest.mark.parametrize("content", BROKEN_INDEXES.values(), ids=BROKEN_INDEXES.keys())
def test_indexes_that_are_broken(content: Any, verb: str, copy: Path, commands: Commands, refused: Refused) -> None:
    shutil.copy(copy / "model.safetensors", copy.parent / "outside.safetensors")
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(commands(copy)[verb], str(copy))
    if verb == "prune":
        shutil.rmtree(copy.parent / "output", ignore_errors=True)
        refused([*commands(copy)[verb], "--layer-wise"], str(copy))


@pytest.mark.parametrize("verb", VERBS)
def test_an_adapter_is_no_model(verb: str, copy: Path, commands: Commands, refused: Refused) -> None:
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "../elsewhere"}')
    refused(commands(copy)[verb], "merge it into its model first")
    (copy / "config.json").unlink()
    refused(commands(copy)[verb], "merge it into its model first")


BROKEN_TOKENIZERS: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "cut off": b'{"version": "1.0", "model"',
    "no object": b"[]",
    "another object": b'{"version": "1.0"}',
    "an unknown model": b'{"version": "1.0", "model": {"type": "Magic"}}',
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("verb", ["prune", "recover", "evaluate", "export"])
@pytest.mark.parametrize("content", BROKEN_TOKENIZERS.values(), ids=BROKEN_TOKENIZERS.keys())
def test_tokenizers_that_are_none(
    content: bytes | None, verb: str, copy: Path, commands: Commands, refused: Refused
) -> None:
    if content is None:
        (copy / "tokenizer.json").unlink()
        (copy / "tokenizer_config.json").unlink()
    else:
        (copy / "tokenizer.json").write_bytes(content)
    refused(commands(copy)[verb], str(copy))


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"tokenizer_class": 7}', '{"tokenizer_class": "NoSuch", "model_max_length": "long"}']
)
def test_settings_of_a_tokenizer_that_are_broken(
    content: str, copy: Path, commands: Commands, run_cli: Callable[[list[str]], tuple[int, str, str]]
) -> None:
    """Some of it transformers does without."""
    (copy / "tokenizer_config.json").write_text(content)
    code, _, errors = run_cli(commands(copy)["evaluate"])
    assert code in (0, 2), errors


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("verb", ["prune", "recover", "evaluate", "export"])
def test_a_tokenizer_with_more_tokens_than_the_embedding(
    verb: str, copy: Path, commands: Commands, refused: Refused
) -> None:
    change_tokenizer(copy, lambda content: content["model"]["vocab"].update({f"x{n}": 96 + n for n in range(10)}))
    refused(commands(copy)[verb], "has 106 tokens, the embedding of the model only 96")


@pytest.mark.parametrize("verb", ["prune", "recover", "evaluate"])
def test_an_added_token_beyond_the_embedding_in_a_text(
    verb: str, copy: Path, commands: Commands, refused: Refused, text_file: Path, tmp_path: Path
) -> None:
    """Such a token does no harm until a text has it."""
    added = {"id": 96, "content": "w5", "single_word": False, "lstrip": False, "rstrip": False}
    added |= {"normalized": False, "special": True}

    def change(content: dict[str, Any]) -> None:
        content["added_tokens"].append(added | {"content": "EXTRA"})

    change_tokenizer(copy, change)
    text = tmp_path / "extra.txt"
    text.write_text(text_file.read_text().replace(" ", " EXTRA "))
    command = [part if part != str(text_file) else str(text) for part in commands(copy)[verb]]
    refused(command, "token 96", "embedding")


def test_a_tokenizer_without_special_tokens_will_do(
    copy: Path, commands: Commands, run_cli: Callable[[list[str]], tuple[int, str, str]]
) -> None:
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for verb in ("prune", "recover", "evaluate"):
        shutil.rmtree(copy.parent / "output", ignore_errors=True)
        code, _, errors = run_cli(commands(copy)[verb])
        assert code == 0, errors


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf_file(tmp_path / "model.gguf", "llama")


def write_gguf_file(path: Path, architecture: str) -> Path:
    """Well-formed, with some of what a Llama needs."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_embedding_length(8)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BROKEN_GGUF: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda content: b"",
    "text": lambda content: b"once upon a time there was a model" * 100,
    "another magic": lambda content: b"GGML" + content[4:],
    "magic alone": lambda content: content[:4],
    "an old version": lambda content: content[:4] + struct.pack("<I", 1) + content[8:],
    "a future version": lambda content: content[:4] + struct.pack("<I", 77) + content[8:],
    "cut off in the header": lambda content: content[:60],
    "cut off in the data": lambda content: content[:-64],
    "endless tensors": lambda content: content[:8] + struct.pack("<Q", 2**62) + content[16:],
    "endless fields": lambda content: content[:16] + struct.pack("<Q", 2**62) + content[24:],
    "an endless name": lambda content: content[:24] + struct.pack("<Q", 2**62) + content[32:],
    "too little": lambda content: content,
}


@pytest.mark.parametrize(
    ("change", "verb"), list(zip(BROKEN_GGUF.values(), itertools.cycle(VERBS), strict=False)), ids=BROKEN_GGUF.keys()
)
def test_gguf_files_that_are_none(
    change: Callable[[bytes], bytes], verb: str, gguf_file: Path, commands: Commands, refused: Refused
) -> None:
    gguf_file.write_bytes(change(gguf_file.read_bytes()))
    refused(commands(gguf_file)[verb])


def test_a_gguf_file_of_layers_that_differ(commands: Commands, refused: Refused, tmp_path: Path) -> None:
    for command in commands(write_gguf_file(tmp_path / "model.gguf", "deci")).values():
        refused(command, "transformers cannot read the GGUF architecture 'deci'", "give the safetensors folder")


def test_a_gguf_file_that_is_a_folder(commands: Commands, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").mkdir()
    for command in commands(tmp_path / "a.gguf").values():
        refused(command, "there is no GGUF file at")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "holds no model"),
        ("nobody/nothing", "the Hub is not contacted in offline mode (HF_HUB_OFFLINE is set)"),
        ("no spaces in/ids", "cannot load 'no spaces in/ids'"),
        ("a//b", "no model at"),
        ("../../nothing", "no model at"),
        ("~nobody-of-this-name/model", "there can be nothing at"),
        ("x" * 5000, "there can be nothing at"),
        ("http://example.org/model", "no model at"),
        ("model\n\x1b[2J", "cannot load"),
    ],
)
def test_names_that_are_none(
    name: str, message: str, commands: Commands, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(name).values():
        refused(command, message)


ABSURD: list[tuple[dict[str, Any], str]] = [
    ({"per_layer_config": {"1": {"model_type": "gpt2"}}}, "per_layer_config"),
    ({"per_layer_config": {"1": {"intermediate_size": 23, "hidden_size": 10**9}}}, "per_layer_config"),
    ({"per_layer_config": {"1": {"intermediate_size": 10**9}}}, "intermediate_size of layer 1"),
    ({"added_biases": ["mlp.down_proj"] * 10**6}, "added_biases"),
    ({"added_biases": ["mlp.down_proj", "../evil"]}, "added_biases"),
    ({"added_biases": "mlp.down_proj"}, "added_biases"),
    ({"intermediate_size": 10**9}, "intermediate_size"),
    ({"head_dim": 10**9}, "head_dim"),
    ({"hidden_size": 6 * 10**8}, "hidden_size"),
    ({"num_attention_heads": 3 * 10**9, "hidden_size": 24 * 10**9}, "hidden_size"),
]


@pytest.mark.parametrize(("fields", "named"), ABSURD, ids=[json.dumps(fields)[:50] for fields, _ in ABSURD])
def test_configs_that_would_build_for_ever(
    fields: dict[str, Any], named: str, copy: Path, commands: Commands, refused: Refused
) -> None:
    change_config(copy, **fields)
    started = time.process_time()
    refused(commands(copy)["evaluate"], named)
    refused(commands(copy)["inspect"], named)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("verb", ["prune", "export", "recover"])
@pytest.mark.parametrize("name", ["../../evil", "/evil", "a/b", "", "..", "x" * 300, "\n"])
def test_chat_templates_that_would_be_written_elsewhere(
    name: str, verb: str, copy: Path, commands: Commands, refused: Refused
) -> None:
    path = copy / "tokenizer_config.json"
    templates = [{"name": "default", "template": "x"}, {"name": name, "template": "x"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    refused(commands(copy)[verb], "chat template")


def test_missing_folders_are_no_hub_ids(
    copy: Path, commands: Commands, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent.parent)
    (copy.parent / "empty").mkdir()
    shutil.copy(copy / "config.json", copy.parent / "modal.gguf")
    for name in (f"{copy.parent.name}/modell", str(copy.parent / "modell"), f"./{copy.parent.name}/modell"):
        message = refused(commands(name)["evaluate"], "no model at", "did you mean", "model?")
        assert "Hub is not contacted" not in message
    refused(commands(f"{copy.parent.name}/mode.gguf")["evaluate"], "no GGUF file", "modal.gguf?")
    assert "did you mean" not in refused(commands(f"{copy.parent.name}/quite-another")["evaluate"], "no model at")
    monkeypatch.chdir(copy.parent)
    refused(commands("modell")["evaluate"], "cannot load 'modell'", "did you mean model", "the Hub is not contacted")


def test_a_place_is_the_same_from_everywhere(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    location = find_model(model_folder.name)
    monkeypatch.chdir(tmp_path)
    assert str(location) == model_folder.name
    assert location == find_model(str(model_folder))
    assert load_model(location, "bfloat16").dtype == torch.bfloat16
    assert str(find_model("owner/name")) == "owner/name"


def test_a_hub_that_does_not_answer_is_said_in_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the log of every retry, and with the verbosity of others as it was."""
    endpoint = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/main/{{filename}}")
    monkeypatch.setattr("time.sleep", lambda _: None)
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        message = refused(["inspect", "owner/name"], "cannot load 'owner/name'")
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)
    assert "Hub is not contacted" not in message


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", "float64"),
        ("mps:0", "float64"),
        ("cuda", "no CUDA GPU"),
        ("cuda:1", "no CUDA GPU"),
        ("meta", "computes nothing"),
        ("toaster", "toaster"),
    ],
)
def test_devices_that_will_not_do(
    device: str, message: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AdaPrunerError, match=message) as refusal:
        load_model(find_model(str(model_folder)), device=device)
    assert "`device`" in str(refusal.value)
    assert "AssertionError" not in str(refusal.value)


def test_texts_that_are_longer_than_a_model_was_trained_on(make_model: Callable[..., Any]) -> None:
    """Rotary embeddings go on beyond that, which is said; learned positions do not, and dynamic ones remember."""
    config = make_model("llama", max_position_embeddings=64).config
    assert check_length(config, 64) is None
    assert "65 tokens" in str(check_length(config, 65))
    assert check_length(make_model("bloom").config, 10**6) is None
    with pytest.raises(AdaPrunerError, match="64 positions and no more"):
        check_length(make_model("gpt2").config, 65)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make_model("llama", max_position_embeddings=64, rope_parameters=dynamic)
    with pytest.raises(AdaPrunerError, match="dynamic rotary embeddings"):
        check_length(model.config, 65)
    windows = torch.arange(3, 67).view(1, -1)
    assert check_length(model.config, 64) is None
    with torch.no_grad():
        before = model(windows[:, :40]).logits
        model(windows)
        assert torch.equal(model(windows[:, :40]).logits, before)
