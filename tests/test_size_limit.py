"""A size or a memory limit instead of a ratio: bytes against files and caches, the ratio, refusals, and runs."""

import inspect
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from adapruner import AdaPrunerError, PruneConfig
from adapruner.budget.counts import Budget, BudgetError, Profile, kept_counts
from adapruner.budget.plan import make_plan
from adapruner.checkpoint import save_checkpoint
from adapruner.model.loading import empty_model
from adapruner.options import SizeLimit
from adapruner.run.folder import RunFolder
from adapruner.run.options import cache_bytes, ratio_within, safetensors_bytes
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from run_helpers import QUICK, exit_code, prune_command, stages_done

MakeModel = Callable[..., PreTrainedModel]
OPTIONS = {name: value for name, value in QUICK.items() if name != "ratio"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_safetensors_are_those_of_the_file(dtype, tied, make_model, tokenizer, tmp_path):
    model = make_model(tie_word_embeddings=tied).to(dtype)
    save_checkpoint(model, tokenizer, tmp_path / "model")
    assert safetensors_bytes(empty_model(model.config), dtype) == size_of(tmp_path / "model")


@pytest.mark.parametrize("longest", [16, 2**20])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_bytes_of_the_cache_are_those_of_the_cache(family, longest, make_model, monkeypatch):
    monkeypatch.setattr("adapruner.run.options._LONGEST_RUN", longest)
    model, batch, context = make_model(family), 3, 20
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(batch, context, dtype=torch.long), **{name: cache})
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(empty_model(model.config), batch, context, torch.float32) == held


def config_of(model_folder: Path, **options: Any) -> PruneConfig:
    return PruneConfig.from_options(model=str(model_folder), round_to=1, protect_first=0, protect_last=0, **options)


def size_of(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6])
def test_every_plan_at_the_ratio_is_small_enough(share, model, model_folder):
    """Whatever is cut at it: channels or heads, in all layers or in a few."""
    limit = int(share * size_of(model_folder))
    ratio = ratio_within(SizeLimit(size=str(limit)), config_of(model_folder))
    structure, sizes = build_structure(model), []
    scores = torch.zeros(structure.group_offsets[-1])
    generator = random.Random(0)
    while len(sizes) < 20:
        profile = Profile(generator.randint(0, 1), generator.randint(0, 1))
        try:
            counts = kept_counts(structure, Budget(ratio, profile, generator.uniform(0, 1)))
        except BudgetError:
            continue
        sizes.append(
            safetensors_bytes(prune_model(model, structure, make_plan(structure, scores, counts)), model.dtype)
        )
    assert 0.98 * limit <= max(sizes) <= limit


def test_what_cannot_be_met_is_refused_with_the_smallest_possible(model_folder):
    dense = size_of(model_folder)
    with pytest.raises(AdaPrunerError, match=rf"`size` 1GB: .* in {dense / 1e6 + 0.005:.2f} MB"):
        ratio_within(SizeLimit(size="1GB"), config_of(model_folder))
    with pytest.raises(AdaPrunerError, match="`memory` 1GB: the weights and the KV cache of the dense model fit"):
        ratio_within(SizeLimit(memory="1GB"), config_of(model_folder))
    with pytest.raises(
        AdaPrunerError, match=r"`size` 1kB cannot be met: at best .* of the parameters removed"
    ) as refused:
        ratio_within(SizeLimit(size="1kB"), config_of(model_folder))
    # However large the cache is.
    with pytest.raises(AdaPrunerError, match=rf"with {str(refused.value).partition('with ')[2].partition(';')[0]}"):
        ratio_within(SizeLimit(memory="4GB", context=4_000_000_000, batch=1000), config_of(model_folder))
    smallest = re.search(r"at best ([\d.]+ MB), with ([\d.]+)%", str(refused.value))
    assert smallest
    assert ratio_within(SizeLimit(size=smallest[1]), config_of(model_folder)) <= float(smallest[2]) / 100 + 0.001


def test_memory_is_the_size_and_the_cache(model, model_folder):
    config, size = config_of(model_folder), int(0.8 * size_of(model_folder))
    cache = cache_bytes(empty_model(model.config), 4, 64, model.dtype)
    within = [
        ratio_within(limit, config)
        for limit in (SizeLimit(size=str(size)), SizeLimit(memory=str(size + cache), batch=4, context=64))
    ]
    assert within[0] == within[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "90XB"}, "--size 90XB is not a size: expected a number with a unit, as 400MB"),
        ({"size": "1,500MB"}, "--size 1,500MB is not a size"),
        ({"size": "1.5.5GB"}, "--size 1.5.5GB is not a size"),
        ({"memory": "50%"}, "--memory 50% is not a size"),
        ({"memory": "0MB"}, "--memory 0MB must be positive"),
        ({"size": "1MB", "memory": "1MB"}, "--size and --memory both say how much is removed: give one"),
        ({"size": "1MB", "ratio": 0.1}, "--ratio and --size both say how much is removed: give one"),
        ({"size": "1MB", "batch": 4}, "add --memory"),
        ({"size": "1MB", "ratio_of": "groups", "space": "paper"}, "--ratio-of groups needs a ratio"),
        ({"size": "1kB"}, "--size 1kB cannot be met: at best 0."),
    ],
)
def test_sizes_that_are_refused(options, message, model_folder, text_file, tmp_path, capsys):
    assert exit_code(prune_command(model_folder, tmp_path / "run", text_file, OPTIONS | options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["size", "memory"])
def test_a_run_has_the_ratio_of_its_size(option, model_folder, text_file, tmp_path):
    """Also one that takes the place of the ratio of a recipe or of an earlier run."""
    limit, run = int(0.87 * size_of(model_folder)), tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text("ratio: 0.3\n")
    others = {"context": 1} if option == "memory" else {"recipe": tmp_path / "recipe.yaml"}
    command = prune_command(model_folder, run, text_file, OPTIONS | {option: limit, **others})
    assert exit_code(command) == 0
    assert 0.96 * limit <= size_of(run / "model") <= limit
    config, stages = RunFolder(run).read_config(), stages_done(run)
    assert 0.1 < config.ratio < 0.2
    assert not {"size", "memory"} & config.model_dump().keys()
    assert exit_code(command) == 0
    assert stages_done(run) == stages
    smaller = int(0.8 * size_of(model_folder))
    assert exit_code(["prune", "--from", str(run), "--size", str(smaller), "-o", str(tmp_path / "smaller")]) == 0
    assert size_of(tmp_path / "smaller/model") <= smaller
    assert "searching" not in stages_done(tmp_path / "smaller")
