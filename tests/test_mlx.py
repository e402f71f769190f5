"""mlx-lm reads folders whose layers differ, and computes what transformers computes.

Needs `pip install 'mlx-lm[cpu]'`, which has wheels for macOS and for Linux with glibc 2.35 or newer.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapruner.budget.plan import make_plan
from adapruner.checkpoint import save_checkpoint
from adapruner.families import learn
from adapruner.families.inference import random_model
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from tiny_families import cut_to, tiny_config

mlx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
generation = pytest.importorskip("mlx_lm.generate")
NEW_TOKENS = 12
# From ten layers on, transformers pads their numbers with zeros.
LAYERS = 12


def pruned(model_type: str, **fields: object) -> PreTrainedModel:
    """Every layer has lost another number of every kind of groups."""
    config = tiny_config(model_type, num_hidden_layers=LAYERS)
    for name, value in fields.items():
        setattr(config, name, value)
    learn(config)
    model = random_model(config)
    structure = build_structure(model)
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    most = {"heads": 1, "channels": 40, "experts": 2}
    counts = [max(1, block.groups - min(most[block.kind], block.layer)) for block in structure.blocks]
    return prune_model(model, structure, make_plan(structure, scores, counts))


def without_attention(model_type: str) -> PreTrainedModel:
    """The first and the third layer have no attention."""
    gone = {(0, "heads"), (2, "heads")}
    model = random_model(tiny_config(model_type, num_hidden_layers=LAYERS))
    return cut_to(model, lambda block: 0 if (block.layer, block.kind) in gone else block.groups)


def read(folder: Path, trusted: bool = True) -> object:
    model, _ = mlx_lm.load(str(folder), trust_remote_code=trusted)
    return model


def check_equal(folder: Path) -> None:
    """Logits and greedy tokens, with and without the cache of mlx-lm."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    prompt = list(range(20, 40))
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": -1}
    tokens = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    in_mlx = read(folder)
    made = torch.tensor(in_mlx(mlx.array([prompt]))[0].tolist())
    torch.testing.assert_close(made, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
    steps = generation.generate_step(mlx.array(prompt), in_mlx, max_tokens=NEW_TOKENS)
    assert [int(token) for token, _ in steps] == tokens


def with_two_kinds_of_layers():
    """Every sixth layer of Gemma 3 has no sliding window, and mlx-lm needs one of these."""
    layers = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    return pruned("gemma3_text", layer_types=layers, tie_word_embeddings=True)


@pytest.mark.parametrize(
    "make", [lambda: pruned("qwen3_moe"), lambda: without_attention("olmo2"), with_two_kinds_of_layers]
)
def test_mlx_computes_the_same(make, tokenizer, tmp_path):
    """Every family is in benchmarks/engines.py."""
    save_checkpoint(make(), tokenizer, tmp_path / "model")
    assert (tmp_path / "model" / "mlx_pruned.py").is_file()
    check_equal(tmp_path / "model")


def test_mlx_asks_before_it_runs_the_file(tokenizer, tmp_path):
    save_checkpoint(pruned("llama"), tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match=r"mlx_pruned\.py"):
        read(tmp_path / "model", trusted=False)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("bloom", "Model type bloom not supported"), ("gpt_neox", "mlx-lm cannot build this pruned gpt_neox")],
)
def test_what_mlx_cannot_build_is_said_in_a_line(model_type, message, tokenizer, tmp_path):
    save_checkpoint(pruned(model_type), tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match=message) as refusal:
        read(tmp_path / "model")
    assert "\n" not in str(refusal.value)


def test_a_width_that_does_not_fit(tokenizer, tmp_path):
    save_checkpoint(pruned("llama"), tokenizer, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["per_layer_config"]["02"]["intermediate_size"] = 88
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"llama: model\.layers\.2\.mlp\.\w+\.weight is .*94.* and .*88.* in mlx-lm"):
        read(tmp_path / "model")
