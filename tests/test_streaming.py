"""Models whose layers stay in their files, against the same models in memory."""

import gc
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.budget.counts import Budget, Profile, kept_counts
from adapruner.budget.plan import PruningPlan, make_plan
from adapruner.checkpoint import save_checkpoint
from adapruner.evaluation import losses as _losses
from adapruner.evaluation.losses import losses_by_batch, token_losses
from adapruner.families import open_model
from adapruner.families.inference import infer_architecture, random_model
from adapruner.measurement.moments import measure_moments
from adapruner.measurement.taylor import measure
from adapruner.model import generation as _generation
from adapruner.model.architecture import architecture_of, known_architectures, remember_family
from adapruner.model.config import load_config
from adapruner.model.generation import continue_texts
from adapruner.model.layers import (
    decoder_layers,
    enter_layers,
    is_streamed,
    loaded_layer,
    skipping_layers,
    whole_state,
    without_weights,
)
from adapruner.model.loading import check_streamable, empty_model, in_fastest_dtype, load_model
from adapruner.model.places import find_model
from adapruner.structure.blocks import Structure
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from adapruner.text.blends import BlendPart
from adapruner.train.examples import window_examples
from adapruner.train.healing import healing_options
from adapruner.train.training import train
from machine import memory, reset_peak
from tiny_families import tiny_config


def random_plan(structure: Structure, budget: Budget, seed: int = 0) -> PruningPlan:
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(seed))
    return make_plan(structure, scores, kept_counts(structure, budget))


def noting_reads(streamed: PreTrainedModel) -> list[int]:
    """The numbers of the layers that are read from now on."""
    read: list[int] = []
    for number, layer in enumerate(decoder_layers(streamed)):
        stream, inner = layer.stream, layer.stream.read
        stream.read = lambda number=number, inner=inner: (read.append(number), inner())[1]
    return read


def on_disk(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder, max_shard_size="20KB")
    return str(folder)


@pytest.mark.parametrize("family", known_architectures())
def test_every_family_is_the_same_out_of_its_files(family, make_model, windows, tmp_path):
    model = make_model(family)
    streamed = load_model(find_model(on_disk(model, tmp_path)), layer_wise=True)
    assert is_streamed(streamed)
    assert not is_streamed(model)
    with torch.no_grad():
        assert torch.equal(streamed(windows).logits, model(windows).logits)
    structure = build_structure(model)
    expected = measure(model, structure, windows, layer_wise=True)
    for name, values in measure(streamed, structure, windows, layer_wise=True).per_sample.items():
        assert torch.equal(values, expected.per_sample[name])
    assert all(parameter.is_meta for layer in decoder_layers(streamed) for parameter in layer.parameters())
    with loaded_layer(streamed, 1) as layer:
        assert not any(parameter.is_meta for parameter in layer.parameters())


@pytest.mark.parametrize("family", known_architectures())
def test_layers_run_by_themselves_are_those_of_the_model(family, make_model, windows):
    """One after the other they give what the model gives, and a model goes on behind any of them."""
    model = make_model(family)
    with torch.no_grad():
        logits = model(windows).logits
        first, second = enter_layers(model, windows.split(4))
        states = [state for state, _ in (first, second)]
        for index, layer in enumerate(decoder_layers(model)):
            states = [calls[index].run(layer, state) for (_, calls), state in zip((first, second), states, strict=True)]
            for batch, state, (_, calls) in zip(windows.split(4), states, (first, second), strict=True):
                with skipping_layers(model, index + 1, state, calls[0]):
                    behind = model(batch).logits
                expected = logits[:4] if len(batch) == 4 else logits[4:]
                torch.testing.assert_close(behind, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(model(windows).logits, logits)


@pytest.mark.parametrize("head_share", [0.0, 1.0])
def test_a_streamed_model_is_cut_compensated_and_saved(head_share, model, windows, tokenizer, tmp_path, monkeypatch):
    # What is in memory would run in bfloat16 where that is fast; a streamed model runs as it is.
    monkeypatch.setattr("adapruner.model.loading.computes_bfloat16_natively", lambda _: False)
    structure = build_structure(model)
    streamed = load_model(find_model(on_disk(model, tmp_path / "dense")), layer_wise=True)
    plan = random_plan(structure, Budget(0.1, Profile(1, 0), heads=head_share))
    saved = []
    for dense in (model, streamed):
        compensation = dict(measure_moments(dense, structure, windows))
        pruned = prune_model(dense, structure, plan, compensation)
        folder = tmp_path / f"pruned{len(saved)}"
        save_checkpoint(pruned, tokenizer, folder)
        saved.append(load_model(find_model(str(folder))))
        assert is_streamed(pruned) == (dense is streamed)
        with torch.no_grad():
            torch.testing.assert_close(pruned(windows).logits, saved[-1](windows).logits)
    for name, tensor in saved[0].state_dict().items():
        torch.testing.assert_close(saved[1].state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", known_architectures())
def test_a_pruned_model_is_run_with_one_reading(family, make_model, windows, tmp_path):
    """Against the same model cut in memory."""
    model = make_model(family)
    structure = build_structure(model)
    compensation = dict(measure_moments(model, structure, windows))
    plan = random_plan(structure, Budget(0.1, Profile(1, 0), heads=0.5), 0)
    streamed = load_model(find_model(on_disk(model, tmp_path)), layer_wise=True)
    read = noting_reads(streamed)
    losses = list(losses_by_batch(prune_model(streamed, structure, plan, compensation), windows))
    # The first layer is also read to see what layers are called with.
    assert read == [0, *range(structure.layers)]
    expected = losses_by_batch(prune_model(model, structure, plan, compensation), windows)
    torch.testing.assert_close(torch.cat(losses), torch.cat(list(expected)), rtol=1e-4, atol=1e-6)


def test_many_batches_are_evaluated_with_one_reading(model, windows, tmp_path, monkeypatch):
    """Batches of two windows: all three with one reading, then two with one and one with another."""
    streamed = load_model(find_model(on_disk(model, tmp_path)), layer_wise=True)
    monkeypatch.setattr(_losses, "_TOKENS_PER_BATCH_ON_CPU", 2 * windows.shape[1])
    read = noting_reads(streamed)
    with_one_reading = [0, *range(len(decoder_layers(model)))]
    for tokens, readings in ((6 * windows.shape[1], 1), (4 * windows.shape[1], 2)):
        monkeypatch.setattr(_losses, "_TOKENS_PER_READING", tokens)
        read.clear()
        losses = list(token_losses(streamed, windows))
        assert read == readings * with_one_reading
        expected = list(token_losses(model, windows))
        assert [torch.equal(own, other) for own, other in zip(losses, expected, strict=True)] == [True] * 3


# What caches hold of other families is in tests/test_generation.py.
@pytest.mark.parametrize("family", ["bloom", "gemma2", "gpt2", "llama"])
def test_the_same_texts_are_written_with_one_reading_for_a_token(family, make_model, tmp_path, monkeypatch):
    """Batches of three texts, some of which end early; at most two batches are continued together."""
    monkeypatch.setattr(_generation, "_MOST_ROWS", 3)
    monkeypatch.setattr(_generation, "_CHECKED_EVERY", 4)
    model = make_model(family)
    streamed = load_model(find_model(on_disk(model, tmp_path)), layer_wise=True)
    batch_bytes = 3 * 13 * 4 * architecture_of(model.config).cached(model.config)
    monkeypatch.setattr(_generation, "_MOST_CACHED", 2 * batch_bytes)
    prompts, temperatures = [[11, 12], [15], [24]] * 3, torch.tensor([1.0, 0.0, 0.7] * 3)
    for ends in ((), range(2, 96, 8)):
        expected = continue_texts(model, prompts, 11, temperatures, 5, ends)
        read, steps = noting_reads(streamed), list[float]()
        assert torch.equal(continue_texts(streamed, prompts, 11, temperatures, 5, ends, steps.append), expected)
        assert sum(steps) == pytest.approx(len(prompts))
        assert len(read) <= 2 * 11 * len(decoder_layers(model))
    assert not torch.equal(expected[:3], expected[3:6])


@pytest.mark.parametrize(("family", "native"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_scales_are_tuned_as_in_memory(family, native, make_model, tmp_path, monkeypatch):
    """Of weights that were changed at random; in every step a layer is read twice."""
    monkeypatch.setattr("adapruner.model.loading.computes_bfloat16_natively", lambda _: native)
    model = make_model(family)
    dense = on_disk(model, tmp_path / "dense")
    with torch.no_grad():
        for weight in decoder_layers(model)[1].parameters():
            weight *= 1 + 0.3 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
    changed = on_disk(model, tmp_path / "changed")
    settings = healing_options("ia3", 11 * 64, 16, 0, torch.device("cpu"), layer_wise=True)
    settings = settings.model_copy(update={"steps": 11, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 5e-3})
    text = torch.randint(4, 90, (48, 16), generator=torch.Generator().manual_seed(1))
    tuned, reads = [], list[list[int]]()

    def load(layer_wise: bool) -> PreTrainedModel:
        loaded = load_model(find_model(changed), layer_wise=layer_wise)
        if layer_wise:
            reads.append(noting_reads(loaded))
        return loaded

    for way in (False, True):
        teacher = in_fastest_dtype(load_model(find_model(dense), layer_wise=way))
        blend = [window_examples(text, BlendPart("text", 1.0, None), settings, label_weight=0.0)]
        trained, record = train(partial(load, way), blend, settings, tmp_path / f"work-{way}", teacher)
        counts = [read.count(0) for read in reads]
        assert is_streamed(trained) == way
        assert record.loss_after < record.loss_before
        tuned.append((whole_state(trained), record))
    (expected, record), (state, other) = tuned
    assert record.steps == 11
    # And once for each validation.
    assert 2 * 11 + 2 <= counts[0] <= 2 * 11 + 7
    assert counts[1:] in ([], [0])
    assert other.loss_after == pytest.approx(record.loss_after, rel=1e-2 if native else 1e-5)
    untouched = model.state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(state[name], weight, rtol=1e-2 if native else 1e-5, atol=1e-6)
        assert state[name].equal(untouched[name]) == weight.equal(untouched[name])


def test_a_cut_model_is_gone_with_its_last_reference(model, windows, tmp_path):
    """Without the collector of cycles, which may come many trials later."""
    structure = build_structure(model)
    plan = random_plan(structure, Budget(0.1, Profile(1, 1)))
    for dense in (model, load_model(find_model(on_disk(model, tmp_path)), layer_wise=True)):
        gc.disable()
        try:
            pruned = prune_model(dense, structure, plan)
            assert len(list(losses_by_batch(pruned, windows)))
            layer = weakref.ref(decoder_layers(pruned)[1])
            del pruned
            assert layer() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_streamed_model_is_saved_file_by_file(family, windows, tokenizer, tmp_path):
    """What is written is what is written of a model in memory, whatever a file holds of it."""
    config = tiny_config(family)
    if family not in known_architectures():
        remember_family(family, infer_architecture(config))
    model = random_model(config)
    structure = build_structure(model)
    plan = random_plan(structure, Budget(0.1, Profile(0, 0)) if family == "llama" else Budget(0.195, Profile(1, 1)))
    streamed = load_model(find_model(on_disk(model, tmp_path / "dense")), layer_wise=True)
    for folder, dense, size in (("whole", model, "2GB"), ("parts", streamed, "60KB"), ("one", streamed, "2GB")):
        save_checkpoint(prune_model(dense, structure, plan), tokenizer, tmp_path / folder, shard_size=size)
    written = {
        folder: {
            name: tensor
            for file in (tmp_path / folder).glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in ("whole", "parts", "one")
    }
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert len([*(tmp_path / "parts").glob("model-*-of-*.safetensors")]) > 2
    for folder in ("parts", "one"):
        assert written[folder].keys() == written["whole"].keys()
        assert all(torch.equal(tensor, written["whole"][name]) for name, tensor in written[folder].items())
        config, other = ((tmp_path / name / "config.json").read_text() for name in ("whole", folder))
        assert config == other
        with torch.no_grad():
            loaded = load_model(find_model(str(tmp_path / folder)))
            assert torch.equal(loaded(windows).logits, prune_model(model, structure, plan)(windows).logits)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="peaks are read on Linux only")
def test_a_streamed_model_is_saved_in_little_memory(tokenizer, tmp_path):
    """Cut and saved, it needs two files and a layer, where all layers are eight times as much."""
    config = tiny_config("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=16, head_dim=64)
    model = random_model(config)
    largest = max(sum(weight.nbytes for weight in layer.parameters()) for layer in decoder_layers(model))
    structure = build_structure(model)
    plan = random_plan(structure, Budget(0.1, Profile(0, 0)))
    model.save_pretrained(tmp_path / "dense")
    del model
    streamed = load_model(find_model(str(tmp_path / "dense")), layer_wise=True)
    gc.collect()
    reset_peak()
    before = memory("VmHWM")
    save_checkpoint(
        prune_model(streamed, structure, plan), tokenizer, tmp_path / "cut", shard_size=f"{2 * largest // 1000}KB"
    )
    assert memory("VmHWM") - before < 6 * largest


def test_another_dtype(model, windows, tmp_path):
    folder = on_disk(model, tmp_path)
    streamed = load_model(find_model(folder), "bfloat16", layer_wise=True)
    assert streamed.dtype == torch.bfloat16
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(windows).logits
        assert torch.equal(streamed(windows).logits, expected)


def test_weights_are_left_out_in_one_thread_alone():
    """Also where the first of two threads ends first."""
    first, second = without_weights(), without_weights()
    with ThreadPoolExecutor(1) as other:
        other.submit(first.__enter__).result()
        assert not torch.nn.Linear(2, 2).weight.is_meta
        with second:
            assert torch.nn.Linear(2, 2).weight.is_meta
            assert not torch.nn.BatchNorm1d(2).running_mean.is_meta
            other.submit(first.__exit__, None, None, None).result()
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_what_cannot_be_streamed_is_refused(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    with pytest.raises(AdaPrunerError, match="has none: save it as such first"):
        load_model(find_model(str(tmp_path)), layer_wise=True)
    model.save_pretrained(tmp_path)
    model.config.intermediate_size = 32
    model.config.save_pretrained(tmp_path)
    with pytest.raises(AdaPrunerError, match=r"gate_proj.weight is \(24, 48\) in the files and \(32, 48\)"):
        load_model(find_model(str(tmp_path)), layer_wise=True)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(AdaPrunerError, match=r"`layer_wise` .* a \.gguf file is read as a whole"):
        check_streamable(find_model(str(tmp_path / "a.gguf")), model.config)


def counted(folder: Path) -> int:
    """Parameters by the config, without reading weights."""
    return build_structure(empty_model(load_config(find_model(str(folder))))).total_parameters


def rewrite(folder: Path, tensors: dict[str, Tensor] | None = None, **fields: object) -> None:
    """Changes the files of a model."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))
    if tensors:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def all_ways(folder: Path, windows: Tensor) -> list[PreTrainedModel]:
    """Loaded whole and layer by layer, after making sure that both are what transformers loads."""
    location = find_model(str(folder))
    models = [load_model(location), load_model(location, layer_wise=True)]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        for model in models:
            assert model.dtype == reference.dtype
            assert torch.equal(model(windows).logits, reference(windows).logits)
            assert sum(parameter.numel() for parameter in model.parameters()) == counted(folder)
    return models


# One of each way to name the two matrices.
@pytest.mark.parametrize("family", ["bloom", "gpt2", "gpt_neox", "llama", "opt"])
def test_an_output_matrix_beside_a_config_that_ties_is_kept(family, make_model, windows, tokenizer, tmp_path):
    model = make_model(family, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "dense")
    untied = counted(tmp_path / "dense")
    rewrite(tmp_path / "dense", tie_word_embeddings=True)
    assert counted(tmp_path / "dense") == untied
    structure = build_structure(model)
    counts = [max(1, block.groups - block.layer) for block in structure.blocks]
    plan = make_plan(structure, torch.rand(structure.group_offsets[-1]), counts)
    for number, dense in enumerate(all_ways(tmp_path / "dense", windows)):
        pruned = prune_model(dense, structure, plan)
        save_checkpoint(pruned, tokenizer, tmp_path / f"{number}")
        with torch.no_grad():
            loaded = load_model(find_model(str(tmp_path / f"{number}")))
            assert torch.equal(loaded(windows).logits, prune_model(model, structure, plan)(windows).logits)
        assert counted(tmp_path / f"{number}") == plan.total_parameters - plan.removed_parameters


def test_a_mixture_keeps_it_too(windows, tmp_path):
    """Its experts lie in the files one by one, so that its layers are not streamed."""
    config = tiny_config("qwen3_moe")
    config.tie_word_embeddings = False
    random_model(config).save_pretrained(tmp_path)
    rewrite(tmp_path, tie_word_embeddings=True)
    dense = open_model(find_model(str(tmp_path)))
    structure = build_structure(dense)
    counts = [block.groups for block in structure.blocks]
    plan = make_plan(structure, torch.rand(structure.group_offsets[-1]), counts)
    with torch.no_grad():
        torch.testing.assert_close(prune_model(dense, structure, plan)(windows).logits, dense(windows).logits)


def test_an_output_matrix_that_is_the_embedding_is_tied(model, windows, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    rewrite(
        tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tie_word_embeddings=True
    )
    for loaded in all_ways(tmp_path, windows):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_an_embedding_that_is_stored_as_the_output_matrix(make_model, windows, tmp_path):
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, tensors | {"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    all_ways(tmp_path, windows)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "gone"}, torch.float32),
    ],
)
def test_the_dtype_is_that_of_the_config_or_else_of_the_files(fields, dtype, model, windows, tmp_path):
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, **fields)
    assert [loaded.dtype for loaded in all_ways(tmp_path, windows)] == [dtype, dtype]


def test_weights_that_the_config_names(model, windows, tmp_path):
    """Not those of the usual name beside them."""
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: tensor * 1.01 for name, tensor in tensors.items()}, tmp_path / "other.safetensors", {"format": "pt"}
    )
    rewrite(tmp_path, transformers_weights="other.safetensors")
    for loaded in all_ways(tmp_path, windows):
        assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"] * 1.01)


def test_a_model_of_the_hub_that_is_untied_by_its_files(make_model, windows, tmp_path, monkeypatch):
    """From the Hub cache, whose files are links."""
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40)
    model = make_model("llama", tie_word_embeddings=False)
    model.save_pretrained(snapshot)
    rewrite(snapshot, tie_word_embeddings=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("a" * 40)
    location = find_model("owner/name")
    assert not location.is_local
    assert not load_config(location).tie_word_embeddings
    for layer_wise in (False, True):
        with torch.no_grad():
            assert torch.equal(load_model(location, layer_wise=layer_wise)(windows).logits, model(windows).logits)
