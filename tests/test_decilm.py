"""`export --to decilm`: the files say to each engine's reader what is in the weights."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.checkpoint import read_origin, save_checkpoint
from adapruner.families.inference import random_model
from adapruner.formats.decilm import check_decilm
from adapruner.model.places import find_model
from tiny_families import cut_to, tiny_config

LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM = 12, 72, 6, 3, 12
NO_ATTENTION = {3, 10, 11}
WIDTHS = [768, 512, 256, 768, 256, 512, 768, 512, 256, 256, 768, 512]
Shape = tuple[int, ...]


def pruned(model_type: str = "llama", counts: Any = None, **fields: object) -> PreTrainedModel:
    """12 layers of different widths, three without attention.

    Args:
        counts: gives the number of groups that a block keeps, in place of these numbers.
    """
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "head_dim": HEAD_DIM, "intermediate_size": 768}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS}
    if model_type == "mistral":
        sizes["sliding_window"] = None

    def kept(block: Any) -> int:
        if block.kind == "heads":
            return 0 if block.layer in NO_ATTENTION else block.groups
        return WIDTHS[block.layer]

    return cut_to(random_model(tiny_config(model_type, **sizes | fields)), counts or kept)


def exported(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    save_checkpoint(model, tokenizer, folder / "model", record={"base_model": "owner/name"})
    adapruner.export(folder / "model", "decilm", folder / "decilm")
    return folder / "decilm"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def round_up(number: int) -> int:
    return -(-number // 256) * 256


def layer_shapes(prefix: str, hidden: int, query: int, key_value: int, width: int) -> dict[str, Shape]:
    """Shapes of the weights of a Llama layer; a part of size 0 has none, and no norm."""
    shapes: dict[str, Shape] = {}
    if query:
        shapes |= {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (query, hidden),
            "self_attn.o_proj": (hidden, query),
        }
        shapes |= {f"self_attn.{name}_proj": (key_value, hidden) for name in "kv"}
    if width:
        shapes |= {"post_attention_layernorm": (hidden,), "mlp.down_proj": (hidden, width)}
        shapes |= {f"mlp.{name}_proj": (width, hidden) for name in ("gate", "up")}
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def shapes_in_mlx(folder: Path) -> dict[str, Shape]:
    """As mlx-lm reads raw JSON for `nemotron-nas`: heads fill the hidden size, and the factor is rounded."""
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "nemotron-nas"
    assert len(config["block_configs"]) == config["num_hidden_layers"]
    hidden, heads, shapes = config["hidden_size"], config["num_attention_heads"], {}
    assert hidden % heads == 0
    assert not config["attention_bias"]
    assert not config["mlp_bias"]
    for layer, block in enumerate(config["block_configs"]):
        attention, feed_forward = block["attention"], block["ffn"]
        # Other keys, or a missing number in a part that exists, are errors.
        assert attention.keys() == {"no_op", "replace_with_linear", "n_heads_in_group"}
        assert feed_forward.keys() == {"no_op", "replace_with_linear", "ffn_mult"}
        query = key_value = width = 0
        if not attention["no_op"]:
            assert heads % attention["n_heads_in_group"] == 0
            query, key_value = hidden, heads // attention["n_heads_in_group"] * (hidden // heads)
        if not feed_forward["no_op"]:
            width = round_up(int(2 * round(feed_forward["ffn_mult"], 6) * hidden / 3))
        shapes |= layer_shapes(f"model.layers.{layer}", hidden, query, key_value, width)
    return shapes | outer_shapes(config["vocab_size"], hidden, config["tie_word_embeddings"])


def outer_shapes(vocabulary: int, hidden: int, tied: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    return shapes | ({} if tied else {"lm_head.weight": (vocabulary, hidden)})


def shapes_in_torch_engines(config: Any) -> dict[str, Shape]:
    """As vLLM, SGLang and TensorRT-LLM read attributes of the config that the remote code of the folder makes."""
    assert config.architectures == ["DeciLMForCausalLM"]
    first = config.block_configs[0]
    # Without a residual of an attention, vLLM's and SGLang's first norm returns one value where they take two.
    assert not first.attention.no_op
    # SGLang refuses layers of different numbers, and the KV cache is made from the global one.
    groups = {
        config.num_attention_heads // block.attention.n_heads_in_group
        for block in config.block_configs
        if not block.attention.no_op
    }
    assert groups == {config.num_key_value_heads}
    # TensorRT-LLM reads the number of a removed attention too.
    by_layer = [
        config.num_attention_heads // block.attention.n_heads_in_group if block.attention.n_heads_in_group else 0
        for block in config.block_configs
    ]
    shapes = {}
    for layer, (block, key_value_heads) in enumerate(zip(config.block_configs, by_layer, strict=True)):
        assert not block.attention.replace_with_linear
        assert not block.ffn.replace_with_linear
        assert not hasattr(block.ffn, "hidden_act")
        query = 0 if block.attention.no_op else config.num_attention_heads * config.head_dim
        width = 0 if block.ffn.no_op else round_up(int(2 * block.ffn.ffn_mult * config.hidden_size / 3))
        key_value = key_value_heads * config.head_dim
        shapes |= layer_shapes(f"model.layers.{layer}", config.hidden_size, query, key_value, width)
    return shapes | outer_shapes(config.vocab_size, config.hidden_size, config.tie_word_embeddings)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_reader_expects_the_shapes_in_the_file(model_type, tied, tokenizer, tmp_path):
    model = pruned(model_type, tie_word_embeddings=tied)
    folder = exported(model, tokenizer, tmp_path)
    weights, state = stored(folder), model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes_in_mlx(folder) == shapes
    assert shapes_in_torch_engines(AutoConfig.from_pretrained(folder, trust_remote_code=True)) == shapes
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.items())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_config_and_tokenizer_load_without_remote_code(tokenizer, tmp_path):
    """A stock Llama does not: it would compute something else."""
    folder = exported(pruned(), tokenizer, tmp_path)
    assert type(AutoConfig.from_pretrained(folder)).__name__ == "LlamaConfig"
    assert AutoTokenizer.from_pretrained(folder)("w5 w6").input_ids == tokenizer("w5 w6").input_ids
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert read_origin(find_model(str(folder))) == {"base_model": "owner/name", "format": 1, "texts": []}
    with pytest.raises(AdaPrunerError, match="is a DeciLM checkpoint: give the folder that it was made from"):
        adapruner.load(folder)


def test_the_config_of_the_engines_survives_writing(tokenizer, tmp_path):
    config = AutoConfig.from_pretrained(exported(pruned(), tokenizer, tmp_path), trust_remote_code=True)
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert shapes_in_torch_engines(again) == shapes_in_torch_engines(config)


@pytest.mark.parametrize("hidden", [72, 576, 2048, 4096, 5120, 16384])
@pytest.mark.parametrize("multiple", [1, 2, 3, 6, 43, 208])
def test_every_width_is_read_as_it_is(hidden, multiple):
    from adapruner.formats.decilm import _block_config

    factor = _block_config(1, 1, multiple * 256, hidden)["ffn"]["ffn_mult"]
    for read in (factor, round(factor, 6)):
        assert round_up(int(2 * read * hidden / 3)) == multiple * 256


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("qwen3", {}, "computed as Llama or Mistral, not as qwen3"),
        ("mistral", {"sliding_window": 32}, "has no sliding window, this model has one of 32 tokens for up to"),
        ("llama", {"hidden_act": "gelu"}, "with silu, not with gelu"),
        ("llama", {"attention_bias": True}, "has no biases, this model has attention_bias"),
        ("llama", {"mlp_bias": True}, "has no biases, this model has mlp_bias"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        (
            "mistral",
            {"hidden_size": 70, "num_attention_heads": 6, "sliding_window": None},
            "the hidden size, 70, is no multiple of the 6 heads",
        ),
        ("llama", {"intermediate_size": 700}, "layer 0 has 700 channels, in .* a multiple of 256: .* `round_to` 256"),
    ],
)
def test_what_a_dense_model_lacks_is_said_before_a_run(model_type, fields, message):
    with pytest.raises(AdaPrunerError, match=message):
        check_decilm(tiny_config(model_type, **{"intermediate_size": 768} | fields))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            lambda block: block.groups - 32 * (block.kind == "channels" and block.layer == 7),
            "layer 7 has 736 channels, in a DeciLM checkpoint a multiple of 256: prune with `round_to` 256",
        ),
        (
            lambda block: block.groups - (block.kind == "heads" and block.layer == 5),
            "layer 0 has 6 query and 3 key/value heads and layer 5 has 4 and 2; .*: prune with `head_share` 0",
        ),
        (
            lambda block: block.groups * (block.kind == "channels" or block.layer > 0),
            "layer 0 has no attention, which vLLM and SGLang need .* `protect_first` 1",
        ),
    ],
)
def test_counts_that_cannot_be_expressed_are_refused_before_writing(counts, message, tokenizer, tmp_path):
    with pytest.raises(AdaPrunerError, match=message):
        exported(pruned(counts=counts), tokenizer, tmp_path)
    assert not (tmp_path / "decilm").exists()


def test_equal_heads_need_not_fill_the_hidden_size(tokenizer, tmp_path):
    """mlx-lm divides the hidden size by the heads and refuses this; the others read `head_dim`."""
    model = pruned(counts=lambda block: block.groups - (block.kind == "heads"))
    folder = exported(model, tokenizer, tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored(folder).items()}
    assert shapes_in_torch_engines(AutoConfig.from_pretrained(folder, trust_remote_code=True)) == shapes


def test_the_card_says_how_to_run_it(tokenizer, tmp_path):
    save_checkpoint(pruned(), tokenizer, tmp_path / "model", card="# Model\n\n## Loading\n\nold\n\n## More\n")
    adapruner.export(tmp_path / "model", "decilm", tmp_path / "decilm")
    card = (tmp_path / "decilm" / "README.md").read_text()
    assert re.search(r"## Loading\n.*vllm serve FOLDER --trust-remote-code.*\n## More\n", card, re.DOTALL)
    assert "old" not in card


@pytest.mark.parametrize("tied", [True, False])
def test_mlx_computes_the_same_without_remote_code(tied, tokenizer, tmp_path):
    mlx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    generation = importlib.import_module("mlx_lm.generate")
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 2.0, "original_max_position_embeddings": 32}
    model = pruned(tie_word_embeddings=tied, rope_parameters=rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0})
    in_mlx, _ = mlx_lm.load(str(exported(model, tokenizer, tmp_path)))
    prompt = list(range(20, 40))
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
    read = torch.tensor(in_mlx(mlx.array([prompt]))[0].tolist())
    torch.testing.assert_close(read, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": -1}
    tokens = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    steps = generation.generate_step(mlx.array(prompt), in_mlx, max_tokens=24)
    assert [int(token) for token, _ in steps] == tokens


def test_what_a_link_leads_to_is_replaced(tokenizer, tmp_path):
    save_checkpoint(pruned(), tokenizer, tmp_path / "model")
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    adapruner.export(tmp_path / "model", "decilm", tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert len(stored(tmp_path / "place")) > 0


def test_overwriting_replaces_and_leaves_what_is_beside(tokenizer, tmp_path):
    folder = exported(pruned(), tokenizer, tmp_path)
    (tmp_path / "decilm.partial").mkdir()
    (tmp_path / "decilm.partial" / "mine").touch()
    other, name = pruned(), "model.norm.weight"
    other.model.norm.weight.data *= 2
    assert not torch.equal(stored(folder)[name], other.state_dict()[name])
    save_checkpoint(other, tokenizer, tmp_path / "other")
    adapruner.export(tmp_path / "other", "decilm", folder, overwrite=True)
    assert torch.equal(stored(folder)[name], other.state_dict()[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decilm", "decilm.partial", "model", "other"]
    assert [path.name for path in (tmp_path / "decilm.partial").iterdir()] == ["mine"]
