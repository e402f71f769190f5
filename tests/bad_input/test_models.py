"""Model folders and GGUF files that are broken or not what they seem."""

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
from safetensors.torch import load, save

from adapruner.base.errors import AdaPrunerError
from adapruner.model.architecture import check_length
from adapruner.model.loading import load_model
from adapruner.model.places import find_model

VERBS = ("prune", "recover", "evaluate", "benchmark", "export", "inspect")
# These read weights.
READING = ("prune", "recover", "evaluate", "benchmark", "export")


@pytest.fixture
def copy(model_folder, tmp_path):
    """A good model, to be broken."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# What a file is replaced by.
CONFIGS: dict[str, bytes] = {
    "empty": b"",
    "cut off": b'{"model_type": "llama", "hidden_si',
    "no object": b"[1, 2]",
    "binary": bytes(range(256)),
    "utf-16": '{"model_type": "llama"}'.encode("utf-16"),
    "no type": b"{}",
    "another type of type": b'{"model_type": 7}',
    "an unknown type": b'{"model_type": "lama"}',
    "control characters": b'{"model_type": "\\u001b[2J\\n\\nllama"}',
    "endless nesting": b'{"a":' * 100_000,
    "a long number": b'{"model_type": "llama", "hidden_size": ' + b"9" * 10_000 + b"}",
}
# A field of a config of a Llama that makes it another, and what is said of that.
OF_OTHERS: list[tuple[str, Any, str]] = [
    ("model_type", "gte", "no causal language model 'gte'; did you mean 'granite'?"),
    ("model_type", "t5", "'t5' is an encoder-decoder"),
    ("hidden_size", "wide", "cannot load"),
    ("num_attention_heads", 8, "says 8 heads and 3 KV heads, which cannot be shared equally"),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}, "this model is quantized"),
]
TOKENIZERS: dict[str, bytes] = {
    "empty": b"",
    "cut off": b'{"version": "1.0", "model"',
    "no object": b"[]",
    "another object": b'{"version": "1.0"}',
    "an unknown model": b'{"version": "1.0", "model": {"type": "Magic"}}',
    "binary": bytes(range(256)),
}


def with_header(header: Any, rest: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


def of_a_query(**fields: Any) -> Callable[[bytes], bytes]:
    """What the header of a safetensors file says of one tensor, changed."""

    def change(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        name = next(name for name in header if name.endswith("q_proj.weight"))
        return with_header(header | {name: header[name] | fields}, content[8 + length :])

    return change


# What the bytes of the weights become.
WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda content: b"",
    "a header cut off": lambda content: content[:100],
    "data cut off": lambda content: content[:-100],
    "more after the data": lambda content: content + b"more",
    "a pickle": lambda content: b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}\x94.",
    "a long header": lambda content: with_header({}, b"", 10**8),
    "no JSON": lambda content: struct.pack("<Q", 5) + b"{{{{{",
    "shifted": of_a_query(data_offsets=[4, 4 + 48 * 48 * 4]),
    "before the beginning": of_a_query(data_offsets=[-8, 0]),
    "too large": of_a_query(shape=[2**40, 2**40]),
    "an unknown dtype": of_a_query(dtype="F77"),
    "another shape": of_a_query(shape=[24, 96]),
}
Tensors = dict[str, torch.Tensor]


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: change(tensor) for name, tensor in tensors.items()}


# What the tensors become.
TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "none at all": lambda tensors: {},
    "no embedding": without("embed_tokens"),
    "a layer too few": without("layers.3."),
    "no query": without("layers.1.self_attn.q_proj.weight"),
    "a layer too many": lambda tensors: tensors | {"model.layers.4.mlp.up_proj.weight": torch.zeros(24, 48)},
    "narrower": each(lambda tensor: tensor[:-1]),
    "numbers instead of matrices": each(lambda tensor: torch.tensor(1.0)),
    "whole numbers": each(lambda tensor: tensor.to(torch.int32)),
    "complex numbers": each(lambda tensor: tensor.to(torch.complex64)),
}
# The index of weights in several files.
INDEXES: dict[str, Any] = {
    "a list": [],
    "no map": {"metadata": {}},
    "no metadata": {"weight_map": {"a": "model-1.safetensors"}},
    "an empty map": {"metadata": {}, "weight_map": {}},
    "a missing shard": {"metadata": {}, "weight_map": {"a": "model-7.safetensors"}},
    "a folder above": {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}},
    "a pickle": {"metadata": {}, "weight_map": {"a": "model.bin"}},
}
# Names of a chat template, which become names of files.
CHAT_TEMPLATES = {ascii(name[:9]): name for name in ("../../evil", "/evil", "a/b", "", "..", "x" * 300, "\n")}

Break = Callable[[Path], Any]


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Break:
    """Changes the content of a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def replaced(name: str, content: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content)


def with_tensors(change: Callable[[Tensors], Tensors]) -> Break:
    return rewritten("model.safetensors", lambda content: save(change(load(content)), {"format": "pt"}))


def with_fields(name: str, **fields: Any) -> Break:
    return lambda folder: change_json(folder / name, **fields)


def with_model(**fields: Any) -> Break:
    """Changes the model of a tokenizer."""

    def change(folder: Path) -> None:
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        change_json(folder / "tokenizer.json", model=model | fields)

    return change


def with_pattern(pattern: str) -> Break:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return with_fields("tokenizer.json", pre_tokenizer=split)


def with_template(name: str) -> Break:
    templates = [{"name": "default", "template": "x"}, {"name": name, "template": "x"}]
    return with_fields("tokenizer_config.json", chat_template=templates)


def with_index(content: Any) -> Break:
    def write(folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return write


def removed(*names: str) -> Break:
    return lambda folder: [(folder / name).unlink() for name in names]


def with_tokens(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    model["vocab"].update({f"x{n}": 96 + n for n in range(10)})
    change_json(folder / "tokenizer.json", model=model)


def adapter_alone(folder: Path) -> None:
    ADAPTER(folder)
    (folder / "config.json").unlink()


ADAPTER = replaced("adapter_config.json", b'{"base_model_name_or_path": "../elsewhere"}')
LAYER_WISE = "prune --layer-wise"
WRITING = ("prune", "recover", "export")
OF_WRITING = itertools.cycle(WRITING)
TOKENIZED = (*WRITING, "evaluate")
# All of these read a tokenizer by the same way: the cases take turns.
TURNS = itertools.cycle(TOKENIZED)
# All verbs read a config, weights and a GGUF file by the same way, or layer by layer: the cases take turns.
IN_TURN = itertools.cycle(VERBS)
NO_TOKEN = [{"SpecialToken": {"id": "<q>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
OF_NO_TOKEN = {"type": "TemplateProcessing", "single": NO_TOKEN, "pair": NO_TOKEN, "special_tokens": {}}
BEYOND = OF_NO_TOKEN | {"special_tokens": {"<q>": {"id": "<q>", "ids": [999], "tokens": ["<q>"]}}}
# Tokenizers on which their library panics, and tokenizers that load and fail on text.
FAILING: dict[str, Break] = {
    "a panic while loading": with_fields(
        "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "a prefix in the middle of a sign": with_model(
        type="BPE", vocab={"a": 0, "é": 1, "aé": 2}, merges=["a é"], continuing_subword_prefix="éé", unk_token=None
    ),
    "a part of no length": with_fields("tokenizer.json", pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a pattern that backtracks": with_pattern("(?:a|aa)+c"),
    "no unknown token": with_model(unk_token="<nope>"),
    "a token that is none": with_fields("tokenizer.json", post_processor=OF_NO_TOKEN),
}
READ = itertools.cycle((verb, LAYER_WISE) for verb in READING)
NO_NUMBERS = with_tensors(each(lambda tensor: torch.full_like(tensor, torch.nan)))
# What is broken, the verbs that meet it, and what all of them say; FOLDER stands for the model.
BROKEN: list[tuple[str, Break, tuple[str, ...], str]] = [
    *((f"config: {name}", replaced("config.json", v), (next(IN_TURN),), "") for name, v in CONFIGS.items()),
    *((f"config: {v}", with_fields("config.json", **{name: v}), ("prune",), message) for name, v, message in OF_OTHERS),
    *((f"weights: {name}", rewritten("model.safetensors", v), next(READ), "FOLDER") for name, v in WEIGHTS.items()),
    *((f"tensors: {name}", with_tensors(v), next(READ), "FOLDER") for name, v in TENSORS.items()),
    *((f"index: {name}", with_index(v), next(READ), "FOLDER") for name, v in INDEXES.items()),
    ("weights: data cut off", rewritten("model.safetensors", WEIGHTS["data cut off"]), READING, "FOLDER"),
    ("no weights", removed("model.safetensors"), READING, "FOLDER"),
    ("no numbers", NO_NUMBERS, ("prune",), "dtype"),
    ("no numbers", NO_NUMBERS, ("recover", "evaluate"), ""),
    *(
        (f"tokenizer: {name}", replaced("tokenizer.json", v), (next(TURNS),), "FOLDER")
        for name, v in TOKENIZERS.items()
    ),
    *((f"tokenizer: {name}", v, (verb,), "FOLDER") for (name, v), verb in zip(FAILING.items(), TURNS, strict=False)),
    ("tokenizer: a token beyond its own", with_fields("tokenizer.json", post_processor=BEYOND), ("evaluate",), "999"),
    ("no tokenizer", removed("tokenizer.json", "tokenizer_config.json"), TOKENIZED, "FOLDER"),
    ("tokens", with_tokens, TOKENIZED, "has 106 tokens, the embedding of the model only 96"),
    *(
        (f"template: {name}", with_template(v), (next(OF_WRITING),), "chat template")
        for name, v in CHAT_TEMPLATES.items()
    ),
    ("an adapter beside", ADAPTER, VERBS, "merge it into its model first"),
    ("an adapter alone", adapter_alone, VERBS, "merge it into its model first"),
]


@pytest.mark.parametrize(
    ("broken", "verb", "message"),
    [
        pytest.param(broken, verb, message, id=f"{name} {verb}")
        for name, broken, verbs, message in BROKEN
        for verb in verbs
    ],
)
def test_models_that_are_broken(broken, verb, message, copy, command, refused):
    broken(copy)
    verb, *more = verb.split()
    refused(command(verb, *more, model=copy), message.replace("FOLDER", str(copy)))


# Values of a field of the config, one at a time.
FIELDS: dict[str, list[Any]] = {
    "num_hidden_layers": [0, -1, 10**9, 4.5, "four", None, True],
    "hidden_size": [0, -48, 10**30, float("nan"), [48], 64],
    "vocab_size": [0, -1, 10**12, "many", 95],
    "num_attention_heads": [0, -6, 7, "6", 10**9],
    "num_key_value_heads": [0, 4, -3],
    "head_dim": [0, -8, "wide", 7],
    "intermediate_size": [0, -24, 10**18, None],
    "hidden_act": ["magic"],
    "rms_norm_eps": ["small"],
    "dtype": ["float99"],
    "rope_parameters": [{"rope_type": "spiral", "rope_theta": 1e4}, "none"],
    "layer_types": [["full_attention"]],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}, "yes"],
    "model_type": ["gpt2", "t5", "mamba", "clip"],
    "per_layer_config": [
        *({"1": {"intermediate_size": width}} for width in (0, -5, 23)),
        *({"1": field} for field in ({"num_attention_heads": "two"}, {"no_such_field": 23})),
        *({layer: {"intermediate_size": 5}} for layer in ("99", "one")),
        *([1, 2], "all"),
    ],
}
IMPOSSIBLE = [{name: value} for name, values in FIELDS.items() for value in values]
IMPOSSIBLE.append({"model_type": "mixtral", "num_local_experts": 8})


@pytest.mark.parametrize(
    ("fields", "verb"),
    list(zip(IMPOSSIBLE, itertools.cycle(("evaluate", "export")), strict=False)),
    ids=lambda part: json.dumps(part)[:60],
)
def test_configs_that_make_no_model(fields, verb, copy, command, refused):
    change_json(copy / "config.json", **fields)
    refused(command(verb, model=copy))


def test_a_config_that_asks_for_more_than_memory_holds(copy, command, refused):
    """Nothing is allocated for weights that are not in the files."""
    change_json(copy / "config.json", vocab_size=2**30)
    for verb in READING:
        refused(command(verb, model=copy))
    change_json(copy / "config.json", vocab_size=96, num_hidden_layers=300)
    refused(command("evaluate", model=copy), "is missing")


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"tokenizer_class": 7}', '{"tokenizer_class": "NoSuch", "model_max_length": "long"}']
)
def test_settings_of_a_tokenizer_that_are_broken(content, copy, command, run_cli):
    """Some of it transformers does without."""
    (copy / "tokenizer_config.json").write_text(content)
    code, _, errors = run_cli(command("evaluate", model=copy))
    assert code in (0, 2), errors


@pytest.mark.parametrize("verb", ["prune", "recover", "evaluate"])
def test_a_text_on_which_a_tokenizer_panics(verb, copy, command, run_cli, text_file, tmp_path):
    with_pattern("(?:x|xx)+y")(copy)
    text = tmp_path / "x.txt"
    text.write_text(text_file.read_text().replace("w1", "x" * 64))
    code, _, errors = run_cli(command(verb, model=copy, text=text))
    assert code == 2
    # The library has said so, too.
    assert f"the tokenizer {copy} fails on a text: Onig: Regex search error" in errors.splitlines()[-1]


@pytest.mark.parametrize("verb", ["prune", "recover", "evaluate"])
def test_an_added_token_beyond_the_embedding_in_a_text(verb, copy, command, refused, text_file, tmp_path):
    """Such a token does no harm until a text has it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = json.loads((copy / "tokenizer.json").read_text())["added_tokens"]
    added.append({"id": 96, "content": "EXTRA", "special": True, **flags})
    change_json(copy / "tokenizer.json", added_tokens=added)
    text = tmp_path / "extra.txt"
    text.write_text(text_file.read_text().replace(" ", " EXTRA "))
    refused(command(verb, model=copy, text=text), "token 96", "embedding")


def test_a_tokenizer_without_special_tokens_will_do(copy, command, run_cli):
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for verb in ("prune", "recover", "evaluate"):
        shutil.rmtree(copy.parent / "output", ignore_errors=True)
        code, _, errors = run_cli(command(verb, model=copy))
        assert code == 0, errors


@pytest.fixture
def gguf_file(tmp_path):
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
    "another magic": lambda content: b"GGML" + content[4:],
    "a future version": lambda content: content[:4] + struct.pack("<I", 77) + content[8:],
    "cut off in the header": lambda content: content[:60],
    "cut off in the data": lambda content: content[:-64],
    "endless tensors": lambda content: content[:8] + struct.pack("<Q", 2**62) + content[16:],
    "an endless name": lambda content: content[:24] + struct.pack("<Q", 2**62) + content[32:],
    "too little": lambda content: content,
}


@pytest.mark.parametrize(
    ("change", "verb"), list(zip(BROKEN_GGUF.values(), IN_TURN, strict=False)), ids=BROKEN_GGUF.keys()
)
def test_gguf_files_that_are_none(change, verb, gguf_file, command, refused):
    gguf_file.write_bytes(change(gguf_file.read_bytes()))
    refused(command(verb, model=gguf_file))


@pytest.mark.parametrize("verb", VERBS)
def test_gguf_files_that_are_another(verb, command, refused, tmp_path):
    """Those of layers that differ, and one that is a folder."""
    model = write_gguf_file(tmp_path / "model.gguf", "deci")
    refused(command(verb, model=model), "cannot read the GGUF architecture", "deci", "give the safetensors folder")
    (tmp_path / "a.gguf").mkdir()
    refused(command(verb, model=tmp_path / "a.gguf"), "there is no GGUF file at")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "holds no model: it has no config.json"),
        ("nobody/nothing", "the Hub is not contacted in offline mode (HF_HUB_OFFLINE is set)"),
        ("no spaces in/ids", "cannot load 'no spaces in/ids'"),
        ("x" * 5000, "invalid path"),
        ("\udce9", "invalid path"),
        ("http://example.org/model", "no model at"),
        ("model\n\x1b[2J", "cannot load"),
    ],
)
def test_names_that_are_none(name, message, command, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for verb in VERBS:
        refused(command(verb, model=name), message)


ABSURD: list[tuple[dict[str, Any], str]] = [
    ({"per_layer_config": {"1": {"model_type": "gpt2"}}}, "per_layer_config"),
    ({"per_layer_config": {"1": {"intermediate_size": 23, "hidden_size": 10**9}}}, "per_layer_config"),
    ({"per_layer_config": {"1": {"intermediate_size": 10**9}}}, "intermediate_size of layer 1"),
    ({"intermediate_size": 10**9}, "intermediate_size"),
    ({"head_dim": 10**9}, "head_dim"),
    ({"hidden_size": 6 * 10**8}, "hidden_size"),
    ({"num_attention_heads": 3 * 10**9, "hidden_size": 24 * 10**9}, "hidden_size"),
]


@pytest.mark.parametrize(("fields", "named"), ABSURD, ids=[json.dumps(fields)[:50] for fields, _ in ABSURD])
def test_configs_that_would_build_for_ever(fields, named, copy, command, refused):
    change_json(copy / "config.json", **fields)
    started = time.process_time()
    refused(command("evaluate", model=copy), named)
    refused(command("inspect", model=copy), named)
    assert time.process_time() - started < 5


def test_missing_folders_are_no_hub_ids(copy, command, refused, monkeypatch):
    monkeypatch.chdir(copy.parent.parent)
    (copy.parent / "empty").mkdir()
    shutil.copy(copy / "config.json", copy.parent / "modal.gguf")
    for name in (f"{copy.parent.name}/modell", str(copy.parent / "modell"), f"./{copy.parent.name}/modell"):
        message = refused(command("evaluate", model=name), "no model at", "did you mean", "model?")
        assert "Hub is not contacted" not in message
    refused(command("evaluate", model=f"{copy.parent.name}/mode.gguf"), "no GGUF file", "modal.gguf?")
    another = command("evaluate", model=f"{copy.parent.name}/quite-another")
    assert "did you mean" not in refused(another, "no model at")
    monkeypatch.chdir(copy.parent)
    said = ("cannot load 'modell'", "did you mean model", "the Hub is not contacted")
    refused(command("evaluate", model="modell"), *said)


def test_a_place_is_the_same_from_everywhere(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(model_folder.parent)
    location = find_model(model_folder.name)
    monkeypatch.chdir(tmp_path)
    assert str(location) == model_folder.name
    assert location == find_model(str(model_folder))
    assert load_model(location, "bfloat16").dtype == torch.bfloat16
    assert str(find_model("owner/name")) == "owner/name"


def test_a_hub_that_does_not_answer_is_said_in_one_line(refused, monkeypatch):
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
def test_devices_that_will_not_do(device, message, model_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AdaPrunerError, match=message) as refusal:
        load_model(find_model(str(model_folder)), device=device)
    assert "`device`" in str(refusal.value)
    assert "AssertionError" not in str(refusal.value)


def test_texts_that_are_longer_than_a_model_was_trained_on(make_model):
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
