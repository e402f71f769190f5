"""Folders: what is in them, what else reads them, and what is refused."""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, MambaConfig, MambaForCausalLM

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.checkpoint import read_origin, save_checkpoint
from adapruner.families import learn
from adapruner.families.inference import random_model
from adapruner.model.loading import in_fastest_dtype, load_tokenizer
from adapruner.model.places import find_model
from adapruner.remote_code import modeling_pruned
from adapruner.structure.build import build_structure
from tiny_families import cut_to, tiny_config


@pytest.fixture
def pruned(make_model):
    return cut_to(make_model(num_hidden_layers=12))


@pytest.fixture
def folder(pruned, tokenizer, tmp_path):
    """In several shards."""
    save_checkpoint(pruned, tokenizer, tmp_path / "model", shard_size="20KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 3
    return tmp_path / "model"


def test_shards_are_loaded(folder, pruned, windows):
    assert torch.equal(adapruner.load(folder)(windows).logits, pruned(windows).logits)


def test_whoever_may_read_new_files_may_read_the_model(folder, tmp_path):
    (tmp_path / "other").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "other").stat().st_mode}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype, model, tokenizer, tmp_path):
    pruned = cut_to(model.to(dtype))
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    loaded = adapruner.load(tmp_path / "model").state_dict()
    for name, tensor in pruned.state_dict().items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)


def test_the_chat_template_is_kept(pruned, tokenizer, tmp_path):
    tokenizer = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}w1 {{ message.content }} w2 {% endfor %}"
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    loaded = load_tokenizer(find_model(str(tmp_path / "model")))
    chat = [{"role": "user", "content": "w5"}]
    expected = tokenizer.apply_chat_template(chat, tokenize=False)
    assert loaded.apply_chat_template(chat, tokenize=False) == expected == "w1 w5 w2 "


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "the counts are gone": (lambda folder: change_config(folder, per_layer_config=None), r"is \(23,\) .* \(24,\)"),
    "a width is wrong": (
        lambda folder: change_config(folder, per_layer_config={"1": {"intermediate_size": 20}}),
        r"is \(23,\) .* \(20,\)",
    ),
    "the biases have no place": (
        lambda folder: change_config(folder, attention_bias=False, mlp_bias=False),
        r"bias has no place",
    ),
    "there are less weights than layers": (lambda folder: change_config(folder, num_hidden_layers=13), "is missing"),
    "there are more weights than layers": (
        lambda folder: change_config(folder, num_hidden_layers=2, per_layer_config=counts_of_two_layers(folder)),
        "has no place",
    ),
}


def counts_of_two_layers(folder: Path) -> dict[str, Any]:
    counts = json.loads((folder / "config.json").read_text())["per_layer_config"]
    return {layer: fields for layer, fields in counts.items() if int(layer) < 2}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage, folder, capfd):
    capfd.readouterr()
    make, message = DAMAGES[damage]
    make(folder)
    with pytest.raises(AdaPrunerError, match=message) as refusal:
        adapruner.load(folder)
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr().err == ""


def test_settings_of_sampling_without_sampling(pruned, tokenizer, tmp_path):
    """As some models bring them; transformers reads them and refuses to write them."""
    pruned.generation_config.temperature = 0.6
    with pytest.raises(ValueError, match="temperature"):
        pruned.save_pretrained(tmp_path / "plain")
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    settings = adapruner.load(tmp_path / "model").generation_config
    assert settings.do_sample
    assert settings.temperature == 0.6


@pytest.mark.parametrize("fields", [{"early_stopping": True}, {"length_penalty": 0.5}, {"output_scores": True}])
def test_settings_that_do_not_go_together_are_left_out(fields, pruned, tokenizer, tmp_path):
    pruned.generation_config = GenerationConfig(eos_token_id=2, max_length=17, **fields)
    with pytest.raises(ValueError, match=next(iter(fields))):
        pruned.save_pretrained(tmp_path / "plain")
    save_checkpoint(pruned, tokenizer, tmp_path / "model")
    settings = adapruner.load(tmp_path / "model").generation_config
    assert (settings.eos_token_id, settings.max_length) == (2, 17)
    assert all(getattr(settings, name) != value for name, value in fields.items())


def test_no_code_of_others_is_named(model, tokenizer, tmp_path):
    """A uniform cut is a stock model, whatever the config of the dense model says."""
    model.config.auto_map = {"AutoModelForCausalLM": "someone/else--modeling.Other"}
    model.config.model_file = "other_for_mlx.py"
    uniform = cut_to(model, lambda block: block.groups - 1)
    save_checkpoint(uniform, tokenizer, tmp_path / "uniform")
    assert not {"auto_map", "model_file"} & json.loads((tmp_path / "uniform" / "config.json").read_text()).keys()
    assert not list((tmp_path / "uniform").glob("*.py"))


def test_the_config_names_the_file_for_mlx_where_it_is(folder, tmp_path):
    def named(saved: Path) -> str | None:
        name: str | None = json.loads((saved / "config.json").read_text())["model_file"]
        return name

    adapruner.load(folder).save_pretrained(tmp_path / "again")
    for saved in (folder, tmp_path / "again"):
        assert named(saved) == "mlx_pruned.py"
        assert (saved / "mlx_pruned.py").read_text() == Path(modeling_pruned.__file__).with_name(
            "mlx_pruned.py"
        ).read_text()
    # transformers copies only the modelling file to where it runs it.
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "elsewhere")
    assert named(tmp_path / "elsewhere") is None
    assert not (tmp_path / "elsewhere" / "mlx_pruned.py").exists()


WITHOUT_TORCH = """
import importlib.abc, importlib.util, sys
from importlib.machinery import PathFinder

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else found(name, package)
from transformers import AutoConfig, AutoTokenizer
print(type(AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
print(AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)("w5")["input_ids"])
assert "torch" not in sys.modules
"""


def test_the_tokenizer_needs_no_torch(folder, tmp_path):
    """As where mlx-lm runs."""
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(folder)],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PATH": ""},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == ["PrunedLlamaConfig", "[9]"]


def test_a_mixture_has_the_older_name_of_the_number_of_experts(tokenizer, tmp_path):
    config = tiny_config("qwen3_moe")
    learn(config)
    model = random_model(config)
    save_checkpoint(model, tokenizer, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_experts"] == 4
    assert AutoConfig.from_pretrained(tmp_path / "model").num_experts == 4


def test_a_family_that_cannot_be_pruned_is_loaded_all_the_same(tmp_path):
    MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=48, num_hidden_layers=2)).save_pretrained(tmp_path)
    model = adapruner.load(tmp_path)
    assert type(model) is MambaForCausalLM
    with pytest.raises(AdaPrunerError, match="in a mamba, no heads, channels or experts were found"):
        build_structure(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "no heads, channels or experts"),
        ({"model_type": "clip"}, "other models besides a text model"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_what_cannot_be_pruned_is_named(fields, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(AdaPrunerError, match=message):
        adapruner.inspect(tmp_path)


def test_frequencies_stay_exact_in_the_fast_copy(model, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    fast = in_fastest_dtype(model)
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.bfloat16}
    for (name, buffer), (_, original) in zip(fast.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(buffer, original), name


@pytest.mark.parametrize("installed", ["4.56.2", "5.13.1"])
def test_an_older_transformers_is_named(installed, monkeypatch):
    monkeypatch.setattr("transformers.__version__", installed)
    with pytest.raises(ImportError, match=rf"needs transformers 5\.14 or newer; installed is {installed}\. [^\n]*$"):
        runpy.run_path(modeling_pruned.__file__)


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}]
)
def test_older_keys_say_the_same_of_positions(rope, make_model, windows, tokenizer, tmp_path):
    """With the new key alone, and with the older keys alone, the saved model is the same."""
    model = make_model(rope_parameters=rope)
    save_checkpoint(model, tokenizer, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    for absent in (("rope_parameters",), ("rope_theta", "rope_scaling"), ()):
        folder = tmp_path / "-".join(("without", *absent))
        shutil.copytree(tmp_path / "model", folder)
        change_config(folder, **dict.fromkeys(absent))
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(windows).logits
            assert torch.equal(logits, model(windows).logits)


ORIGIN = {
    "base_model": "owner/name",
    "texts": [{"use": "calibration", "text": "wikitext2:train", "identity": "1f", "part": "all"}],
    "plan": "ab",
}


def test_a_checkpoint_says_what_it_was_made_from(pruned, tokenizer, tmp_path):
    save_checkpoint(pruned, tokenizer, tmp_path / "model", record=ORIGIN)
    assert read_origin(find_model(str(tmp_path / "model"))) == ORIGIN | {"format": 1}
    save_checkpoint(pruned, tokenizer, tmp_path / "silent")
    assert read_origin(find_model(str(tmp_path / "silent"))) == {"format": 1, "texts": []}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, None),
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (bytes(range(256)), None),
        (b"[" * 100_000, None),
        (b'{"format": 2, "texts": []}', None),
        (b'{"format": 1, "plan": "' + b"x" * 2**20 + b'"}', None),
        (b'{"format": 1, "texts": 5}', {"format": 1, "texts": []}),
        (b'{"format": 1, "texts": [5, {"use": "training"}, null]}', {"format": 1, "texts": [{"use": "training"}]}),
    ],
)
def test_a_record_that_is_broken_says_nothing(content, expected, model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    if content is not None:
        (folder / "adapruner.json").write_bytes(content)
    assert read_origin(find_model(str(folder))) == expected


@pytest.mark.parametrize("stored", [["config.json"], ["config.json", "generation_config.json"]])
def test_tokens_of_minus_one_are_none(stored, model, tokenizer, windows, tmp_path):
    """As the first Llama has them."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    if len(stored) == 1:
        (tmp_path / "model" / "generation_config.json").unlink()
    for name in stored:
        fields = json.loads((tmp_path / "model" / name).read_text())
        (tmp_path / "model" / name).write_text(json.dumps(fields | {"pad_token_id": -1}))
    save_checkpoint(adapruner.load(tmp_path / "model"), tokenizer, tmp_path / "saved")
    saved = adapruner.load(tmp_path / "saved")
    assert saved.config.pad_token_id is None
    assert saved.generation_config.pad_token_id is None
    assert not saved.generation_config.do_sample
    assert torch.equal(saved(windows).logits, model(windows).logits)


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("to", ["gguf", "decilm"])
def test_only_what_was_written_here_is_replaced(to, folder, model_folder, tmp_path):
    other = Path(shutil.copytree(model_folder, tmp_path / "other"))
    (tmp_path / "file.gguf").write_text("a thesis")
    before = names_below(tmp_path)
    for output in (
        other,
        tmp_path / "file.gguf",
        folder,
        folder / "below",
        tmp_path,
        other / ".." / "model",
        tmp_path / ".",
    ):
        with pytest.raises(AdaPrunerError, match=r"did not write|is not a|overlaps the model"):
            adapruner.export(folder, to, output, overwrite=True)
    assert names_below(tmp_path) == before
    assert (tmp_path / "file.gguf").read_text() == "a thesis"


def test_a_failed_checkpoint_leaves_nothing(pruned, folder, tmp_path):
    before = names_below(tmp_path)

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(AdaPrunerError, match="No space left"):
        save_checkpoint(pruned, Tokenizer(), folder)
    assert names_below(tmp_path) == before
