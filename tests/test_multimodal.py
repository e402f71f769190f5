"""Multimodal models: the decoder inside is pruned, and everything else is written back as it was."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForMultimodalLM, PreTrainedModel, PreTrainedTokenizerFast

import adapruner
from adapruner import AdaPrunerError
from adapruner.checkpoint import save_checkpoint
from adapruner.families import open_model
from adapruner.model import wrapper
from adapruner.model.config import find_wrapper
from adapruner.model.places import find_model
from adapruner.options import Layout
from adapruner.run.inputs import ratio_of_decoder
from adapruner.structure.blocks import Structure
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from adapruner.tokens.model import Vocabulary, configs_with_tokens, cut_vocabulary, named_tokens
from run_helpers import QUICK, exit_code, flags
from tiny_families import random_plan
from tiny_images import masked_logits, with_image
from tiny_wrappers import IMAGE_TOKEN, tiny_wrapper, tiny_wrapper_config

# Every family is in the table of docs/reference/families.md. Muse Glimmer scales and caps its logits after the head.
CASES = [
    *((family, "per-layer") for family in ("gemma3", "llava", "qwen3_vl", "muse_glimmer")),
    *((family, "uniform") for family in ("gemma3", "qwen2_5_vl")),
]
TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(6))
PROCESSOR = {"processor_class": "Gemma3Processor", "image_seq_length": 4}


def write(model_type: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A tiny multimodal model in float64, as a user would have it on disk."""
    model = tiny_wrapper(model_type, torch.float64)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        (folder / name).write_text(json.dumps(PROCESSOR | {"of": name}))
    return model


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def counts_of(structure: Structure, layout: Layout) -> list[int]:
    """Groups that blocks keep: half of them, or in every other layer all but one."""
    fewer = {"uniform": lambda block: block.groups // 2, "per-layer": lambda block: block.groups - 1 - block.layer % 2}
    return [max(block.least, 1, fewer[layout](block)) for block in structure.blocks]


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
    return model.eval()


@pytest.mark.parametrize(("model_type", "layout"), CASES)
def test_the_pruned_model_is_the_masked_one_with_an_image_too(model_type, layout, tokenizer, tmp_path):
    dense = write(model_type, tmp_path / "dense", tokenizer)
    decoder = open_model(find_model(str(tmp_path / "dense")))
    structure = build_structure(decoder)
    plan = random_plan(structure, counts_of(structure, layout))
    with torch.no_grad():
        assert torch.equal(decoder(TOKENS).logits, dense(input_ids=TOKENS).logits)
        pruned = prune_model(decoder, structure, plan)
        save_checkpoint(pruned, tokenizer, tmp_path / "pruned")
        model = loaded(tmp_path / "pruned")
        # Qwen 2.5 VL divides the hidden size by the heads.
        assert (type(model) is type(dense)) == ((model_type, layout) == ("gemma3", "uniform"))
        assert isinstance(model, type(dense))
        assert torch.equal(model(input_ids=TOKENS).logits, pruned(TOKENS).logits)
        again = adapruner.load(tmp_path / "pruned")
        assert torch.equal(again(TOKENS).logits, pruned(TOKENS).logits)
        inputs = with_image(dense)
        before = dense(**inputs).logits
        expected = masked_logits(decoder, structure, plan, dense, inputs)
        assert not torch.allclose(before, expected, rtol=0.01)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-9, atol=1e-9)


def test_weights_with_other_names_in_files_are_loaded(tokenizer, tmp_path):
    tiny_wrapper("deepseek_ocr2").save_pretrained(tmp_path / "dense")
    assert "model.layers.0.self_attn.q_proj.weight" in tensors_in(tmp_path / "dense")
    decoder = open_model(find_model(str(tmp_path / "dense")))
    structure = build_structure(decoder)
    pruned = prune_model(decoder, structure, random_plan(structure, counts_of(structure, "per-layer")))
    save_checkpoint(pruned, tokenizer, tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "pruned")(input_ids=TOKENS).logits, pruned(TOKENS).logits)


def test_too_many_layers_of_a_part_are_refused(tokenizer, tmp_path):
    write("gemma3", tmp_path, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        deep = config | {part: config[part] | {"num_hidden_layers": 200_000_000}}
        (tmp_path / "config.json").write_text(json.dumps(deep))
        with pytest.raises(AdaPrunerError, match="says num_hidden_layers: 200000000, more than"):
            adapruner.inspect(tmp_path)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl"])
def test_everything_but_the_decoder_is_kept_byte_for_byte(model_type, tokenizer, tmp_path):
    write(model_type, tmp_path / "dense", tokenizer)
    decoder = open_model(find_model(str(tmp_path / "dense")), dtype="float32")
    structure = build_structure(decoder)
    save_checkpoint(
        prune_model(decoder, structure, random_plan(structure, counts_of(structure, "per-layer"))),
        tokenizer,
        tmp_path / "pruned",
        shard_size="100KB",
    )
    before, after = tensors_in(tmp_path / "dense"), tensors_in(tmp_path / "pruned")
    others = find_wrapper(find_model(str(tmp_path / "dense"))).other_tensors()
    assert before.keys() == after.keys()
    assert others
    assert not any("language_model" in name or "lm_head" in name for name in others)
    for name in others:
        assert before[name].dtype == after[name].dtype == torch.float64
        assert torch.equal(before[name], after[name])
    assert all(after[name].dtype == torch.float32 for name in after.keys() - others.keys())
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        assert (tmp_path / "pruned" / name).read_text() == (tmp_path / "dense" / name).read_text()


def test_processor_files_are_fetched_with_the_weights(tokenizer, tmp_path, monkeypatch):
    """Where the connection is lost before the model is saved, they are in the cache."""
    write("gemma3", tmp_path, tokenizer)
    fetched, fetch = set(), wrapper.cached_file
    monkeypatch.setattr(
        wrapper, "cached_file", lambda path, name, **more: fetched.add(name) or fetch(path, name, **more)
    )
    open_model(find_model(str(tmp_path)))
    assert fetched >= {"preprocessor_config.json", "processor_config.json", "chat_template.json"}


def test_towers_may_have_more_layers_than_a_decoder_with_a_multi_token_head(tokenizer, tmp_path):
    config = tiny_wrapper_config("llava")
    config.text_config.num_nextn_predict_layers = 1
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers - 1
    AutoModelForMultimodalLM.from_config(config).save_pretrained(tmp_path / "dense")
    save_checkpoint(open_model(find_model(str(tmp_path / "dense"))), tokenizer, tmp_path / "again")
    assert tensors_in(tmp_path / "again").keys() == tensors_in(tmp_path / "dense").keys()


def test_layers_are_read_one_by_one(tokenizer, tmp_path):
    write("gemma3", tmp_path, tokenizer)
    location = find_model(str(tmp_path))
    with torch.no_grad():
        logits = open_model(location)(TOKENS).logits
        assert torch.equal(open_model(location, layer_wise=True)(TOKENS).logits, logits)


def test_a_run_prunes_the_decoder(tokenizer, text_file, tmp_path, capsys):
    dense = write("gemma3", tmp_path / "dense", tokenizer)
    result = adapruner.prune(str(tmp_path / "dense"), output=tmp_path / "run", calibration=str(text_file), **QUICK)
    model = loaded(result.model_folder)
    decoder = result.model
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, decoder(TOKENS).logits)
        assert model(**with_image(dense)).logits.isfinite().all()
    card = (result.model_folder / "README.md").read_text()
    assert "AutoModelForMultimodalLM.from_pretrained(FOLDER, trust_remote_code=True)" in card
    assert "pipeline_tag: image-text-to-text" in card
    whole = sum(tensor.numel() for tensor in tensors_in(tmp_path / "dense").values())
    assert result.result.removed_share == pytest.approx(result.plan.removed_parameters / whole)
    assert f"of the {whole:,} parameters" in card
    assert exit_code(["inspect", str(result.model_folder)]) == 0
    adapruner.recover(result.model_folder, str(text_file), tmp_path / "recovered", steps=1, seq_len=16, device="cpu")
    before, after = tensors_in(result.model_folder), tensors_in(tmp_path / "recovered")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("language_model" in name for name in changed)
    total = sum(parameter.numel() for parameter in model.parameters())
    before = total + result.plan.removed_parameters
    assert result.plan.removed_parameters / before == pytest.approx(QUICK["ratio"], abs=0.005)
    assert f"of its {total:,} parameters" in " ".join(capsys.readouterr().out.split())


def test_a_dry_run_loads_no_weights_and_writes_nothing(tokenizer, tmp_path, monkeypatch):
    write("gemma3", tmp_path / "dense", tokenizer)
    texts = (" ".join(f"w{(start + number) % 90}" for number in range(30)) for start in range(90))
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"image": "a.png", "text": text}) for text in texts))

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("weights are loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    for module in ("stored", "wrapper"):
        monkeypatch.setattr(f"adapruner.model.{module}.read_tensors", refuse)
    before = sorted(tmp_path.rglob("*"))
    command = ["prune", str(tmp_path / "dense"), "--calibration", str(tmp_path / "pairs.jsonl"), "--dry-run"]
    assert exit_code([*command, *flags(QUICK), "-o", str(tmp_path / "run")]) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_ratio_is_of_all_parameters_or_of_the_decoder():
    assert ratio_of_decoder.make(0.8, 0.2, "parameters", None) == 0.25
    assert ratio_of_decoder.make(0.8, 0.2, "decoder", None) == 0.2
    fewer_tokens = SimpleNamespace(summary=SimpleNamespace(removed_share=0.125))
    assert ratio_of_decoder.make(0.8, 0.2, "parameters", fewer_tokens) == 0.125
    assert ratio_of_decoder.make(0.8, 0.2, "decoder", fewer_tokens) == pytest.approx(0.075)
    with pytest.raises(
        AdaPrunerError, match=re.escape("`ratio` 0.8 is not reachable: the decoder, all that is pruned")
    ):
        ratio_of_decoder.make(0.8, 0.8, "parameters", None)


def test_tokens_of_the_processor_are_kept(tokenizer, tmp_path):
    dense = write("gemma3", tmp_path / "dense", tokenizer)
    location = find_model(str(tmp_path / "dense"))
    decoder = open_model(location)
    named = set[int]().union(*map(named_tokens, configs_with_tokens(location, decoder.config)))
    assert IMAGE_TOKEN in named
    inputs = with_image(dense)
    rows = range(decoder.config.vocab_size)
    kept = tuple(sorted({*inputs["input_ids"].flatten().tolist(), *named, *range(20)} & {*rows}))
    vocabulary = Vocabulary(kept=kept)
    cut_vocabulary(decoder, vocabulary)
    save_checkpoint(decoder, tokenizer, tmp_path / "cut")
    model = loaded(tmp_path / "cut")
    assert model.config.image_token_index == vocabulary.new_ids[IMAGE_TOKEN] < model.config.text_config.vocab_size
    fewer = inputs | {"input_ids": inputs["input_ids"].clone().apply_(vocabulary.new_ids.get)}
    with torch.no_grad():
        torch.testing.assert_close(model(**fewer).logits, dense(**inputs).logits[..., list(kept)], rtol=1e-9, atol=1e-9)


def test_an_export_is_the_decoder_alone(tokenizer, tmp_path, capsys):
    config = tiny_wrapper_config("llava")
    config.text_config.intermediate_size = 256
    AutoModelForMultimodalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    adapruner.export(tmp_path / "dense", "decilm", tmp_path / "decoder")
    assert not any("vision" in name for name in tensors_in(tmp_path / "decoder"))
    assert "the projector file (mmproj) is that of the original model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("t5gemma2", "'t5gemma2' is an encoder-decoder, only causal language models can be pruned"),
        ("whisper", "'whisper' is an encoder-decoder"),
        ("qwen2_5_omni", "a qwen2_5_omni has other models besides a text model"),
        ("clip", "a clip has other models besides a text model"),
    ],
)
def test_what_has_no_decoder_inside_is_refused_in_one_line(model_type, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(AdaPrunerError, match=message) as refusal:
        adapruner.inspect(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_model_in_memory_is_to_be_saved_first(tmp_path):
    with pytest.raises(AdaPrunerError, match="a gemma3 in memory has other models besides its decoder: save it"):
        adapruner.inspect(tiny_wrapper("gemma3"))
