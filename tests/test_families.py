"""Families that nobody has described: what is inferred of them, and what the proof finds."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import adapruner
from adapruner import families
from adapruner.base.errors import AdaPrunerError
from adapruner.cli import main
from adapruner.families.inference import infer_architecture, random_model
from adapruner.families.proof import failed_checks, prove
from adapruner.model import architecture as _architecture
from adapruner.model.architecture import (
    Architecture,
    ProjectionNames,
    architecture_of,
    known_architectures,
    register_architectures,
    using_architecture,
)
from adapruner.model.config import load_config
from adapruner.model.loading import empty_model
from adapruner.model.places import find_model
from adapruner.run.steps import describe
from adapruner.structure.blocks import Structure
from adapruner.structure.build import build_structure
from run_helpers import QUICK
from tiny_families import tiny_config


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and a process that has seen no family."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adapruner" / "families"


def run(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code


def contents(structure: Structure) -> list[tuple[object, ...]]:
    return [
        (each.layer, each.kind, each.groups, each.strata, each.config_counts, each.is_normalized, set(each.slices))
        for each in structure.blocks
    ]


@pytest.mark.parametrize("model_type", known_architectures())
def test_the_families_with_a_file_are_inferred_to_the_same_structure(model_type):
    config, shipped = tiny_config(model_type), known_architectures()[model_type]
    inferred, model = infer_architecture(config), empty_model(config)
    for granularity in ("kv-group", "query-head"):
        structures = []
        for architecture in (shipped, inferred):
            with using_architecture(architecture):
                try:
                    structures.append(contents(build_structure(model, granularity)))  # type: ignore[arg-type]
                except AdaPrunerError as refusal:
                    assert granularity == "query-head"
                    structures.append([(str(refusal).partition(":")[0],)])
        assert structures[0] == structures[1]
    for field in ("layers", "learned_positions", "fixed_attention_width", "fixed_channels"):
        assert getattr(inferred, field) == getattr(shipped, field), field


# One of each make: gated attention beside linear attention and experts; latent attention with dense and shared experts;
# interleaved experts with sinks; convolutions; state space; a feed-forward that is as wide as its class rounds.
@pytest.mark.parametrize(
    ("model_type", "kinds", "whole_mixers"),
    [
        ("smollm3", {"heads", "channels"}, []),
        ("gpt_oss", {"heads", "experts"}, []),
        ("deepseek_v3", {"heads", "channels", "experts"}, []),
        ("gemma4_text", {"heads", "channels"}, []),
        ("lfm2_moe", {"heads", "channels", "experts"}, [0, 2]),
        ("granitemoehybrid", {"heads", "experts"}, [0, 2]),
        ("mpt", {"channels"}, [0, 1, 2, 3]),
        ("recurrent_gemma", {"channels"}, [0, 1, 2, 3]),
    ],
)
def test_a_family_without_a_file_is_inferred_and_proven(model_type, kinds, whole_mixers):
    config = tiny_config(model_type)
    architecture = prove(config, infer_architecture(config))
    assert architecture.layouts == ("per-layer", "uniform")
    with using_architecture(architecture):
        structure = build_structure(empty_model(config))
    assert {block.kind for block in structure.blocks} == kinds
    assert structure.whole_mixers == whole_mixers


@pytest.mark.parametrize("heads", [2, 3])
def test_a_family_of_few_heads_is_made_small(heads):
    sizes = {"hidden_size": 48 * heads, "intermediate_size": 512, "num_hidden_layers": 12, "vocab_size": 50_000}
    config = CONFIG_MAPPING["olmo"](**sizes, num_attention_heads=heads, num_key_value_heads=heads)
    assert infer_architecture(config).attention is not None


@pytest.mark.parametrize("hidden_size", [32, 48])
def test_a_state_space_mixer_of_any_size_is_made_small(hidden_size):
    """Its heads times their width must equal a multiple of the hidden size."""
    types = ["mamba", "mamba", "attention"] * 4
    sizes = {"hidden_size": hidden_size, "mamba_n_heads": 4, "mamba_d_head": hidden_size // 2}
    config = tiny_config("granitemoehybrid", num_hidden_layers=12, layer_types=types, mamba_n_groups=1, **sizes)
    architecture = prove(config, infer_architecture(config))
    assert architecture.attention
    assert architecture.experts


# A norm behind each block; behind the attention alone; a multiplier; nothing.
@pytest.mark.parametrize(
    ("model_type", "attention", "feed_forward"),
    [("glm4", True, True), ("olmo_hybrid", True, False), ("granite", False, False), ("smollm3", False, False)],
)
def test_norms_behind_blocks_are_seen(model_type, attention, feed_forward):
    inferred = infer_architecture(tiny_config(model_type))
    assert inferred.attention is not None
    assert inferred.feed_forward is not None
    assert (inferred.attention.normalized, inferred.feed_forward.normalized) == (attention, feed_forward)


WRONG_ROWS = ProjectionNames(inputs={"mlp.gate_proj": ("channels",)}, output="mlp.down_proj")
HEADS_AS_CHANNELS = ProjectionNames(inputs={"self_attn.v_proj": ("channels",)}, output="self_attn.o_proj")


@pytest.mark.parametrize(
    "changes",
    [{"feed_forward": WRONG_ROWS}, {"layers": "model.norm"}, {"feed_forward": HEADS_AS_CHANNELS}],
    ids=["rows", "layers", "heads as channels"],
)
def test_the_proof_finds_what_is_wrong(changes):
    config = tiny_config("llama")
    right = known_architectures()["llama"]
    model = random_model(config)
    assert failed_checks(model, right) == {}
    wrong = Architecture.model_validate(right.model_dump() | changes)
    failures = failed_checks(model, wrong)
    assert failures.keys() == {"per-layer", "uniform"}
    # What is right is left.
    if "feed_forward" in changes:
        proven = prove(config, wrong)
        assert proven.feed_forward is None
        assert proven.attention == right.attention
    else:
        with pytest.raises(AdaPrunerError, match="cannot be pruned"):
            prove(config, wrong.changed(attention=None))


def test_gate_and_up_in_the_wrong_order_are_found():
    """The shapes are right, the rows are not."""
    config = tiny_config("phi3")
    right = known_architectures()["phi3"]
    (path,) = right.feed_forward.inputs if right.feed_forward else ()
    interleaved = ProjectionNames(inputs={path: ("channels",)}, output="mlp.down_proj")
    failures = failed_checks(random_model(config), right.changed(feed_forward=interleaved, attention=None))
    assert "pruned equals masked fails: they differ by" in failures["uniform"]


@pytest.fixture
def smollm3(tmp_path, tokenizer):
    random_model(tiny_config("smollm3")).save_pretrained(tmp_path / "smollm3")
    tokenizer.save_pretrained(tmp_path / "smollm3")
    return tmp_path / "smollm3"


def test_a_family_is_checked_once(smollm3, cache, monkeypatch, capsys):
    first = describe(smollm3)
    assert "checking how smollm3 is built: done in" in capsys.readouterr().err
    (file,) = cache.iterdir()
    assert Architecture.model_validate_json(file.read_bytes()) == first
    config = tiny_config("smollm3")
    with torch.no_grad():
        assert families.resolve(config) == first
    assert capsys.readouterr().err == ""
    file.write_text("{")
    assert families.resolve(config) == first
    assert "checking how smollm3 is built" in capsys.readouterr().err
    monkeypatch.setattr(families.transformers, "__version__", "6.0.0")
    families.resolve(config)
    assert len(list(cache.iterdir())) == 2


def test_what_was_inferred_can_be_a_file(smollm3, tmp_path, capsys):
    run(["inspect", str(smollm3), "--architecture"])
    (tmp_path / "smollm3.yaml").write_text(capsys.readouterr().out)
    inferred = architecture_of(load_config(find_model(str(smollm3))))
    assert register_architectures(tmp_path / "smollm3.yaml") == ["smollm3"]
    assert known_architectures()["smollm3"] == inferred
    run(["inspect", str(smollm3), "--architecture", "--json"])
    assert json.loads(capsys.readouterr().out)["attention"]["output"] == "self_attn.o_proj"


def test_a_family_without_a_file_is_pruned_from_end_to_end(smollm3, text_file, tmp_path):
    result = adapruner.prune(str(smollm3), output=tmp_path / "run", calibration=str(text_file), **QUICK)
    assert 0.095 <= result.result.removed_share <= 0.105
    tokens = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        logits = adapruner.load(result.model_folder)(tokens).logits
        elsewhere = AutoModelForCausalLM.from_pretrained(result.model_folder, trust_remote_code=True)
        assert torch.equal(elsewhere(tokens).logits, logits)
    # A process that has not seen the family loads it too.
    _architecture._inferred.clear()
    assert torch.equal(adapruner.load(result.model_folder)(tokens).logits, logits)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "model_type", "eos_token_id"])
def test_layers_of_an_inferred_family_differ_in_nothing_else(smollm3, field):
    config = json.loads((smollm3 / "config.json").read_text())
    (smollm3 / "config.json").write_text(json.dumps(config | {"per_layer_config": {"1": {field: 5}}}))
    with pytest.raises(AdaPrunerError, match=f"{field}.* per_layer_config|per_layer_config.*{field}"):
        adapruner.inspect(smollm3)


def test_a_layout_that_a_family_cannot_have_is_refused(smollm3, text_file, tmp_path, monkeypatch):
    uniform = infer_architecture(tiny_config("smollm3")).changed(layouts=("uniform",))
    monkeypatch.setattr(families, "_describe", lambda _: uniform)
    with pytest.raises(AdaPrunerError, match="cannot be cut differently: set `layout` to uniform"):
        adapruner.prune(str(smollm3), output=tmp_path / "run", calibration=str(text_file), **QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("mamba", {}, "no heads, channels or experts were found"),
        ("inkling_text", {"num_hidden_layers": 12}, "inkling_text"),
        ("hrm_text", {"num_hidden_layers": 12}, "has no list of 4 decoder layers"),
        # All are state-space mixers by default.
        (
            "granitemoehybrid",
            {"num_hidden_layers": 12, "layer_types": None},
            "transformers cannot run a small granitemoehybrid",
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_a_line(model_type, fields, reason, tmp_path, capsys):
    random_model(tiny_config(model_type, **fields)).save_pretrained(tmp_path / "model")
    with pytest.raises(AdaPrunerError, match=reason):
        adapruner.inspect(tmp_path / "model")
    run(["inspect", str(tmp_path / "model"), "--json"], code=2)
    assert capsys.readouterr().out == ""
