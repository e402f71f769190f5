"""Recipes: every one is valid and opens with its command; those of the paper leave what its protocol leaves."""

import math
import re
import shlex
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from adapruner import AdaPrunerError, PruneConfig
from adapruner.budget.counts import kept_counts, reference_budget
from adapruner.cli import app
from adapruner.model.loading import empty_model
from adapruner.recipes import read_recipe, recipes
from adapruner.run.memory import GIB
from adapruner.run.prune import estimate
from adapruner.structure.build import build_structure

Resolved = Callable[[list[str]], PruneConfig]
RECIPES = sorted(
    (file for file in resources.files("adapruner.recipes").iterdir() if file.name.endswith(".yaml")),
    key=lambda file: file.name,
)
LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)

# Folders with the config of the released model.
MODELS = ("qwen3-8b", "qwen3-30b-a3b", "gemma3-4b", "llama3-70b")
CONFIGS = Path(__file__).parent / "configs"


@pytest.fixture
def resolved(monkeypatch):
    """The config of a command of the command line, before what depends on the model is filled in."""

    def resolve(command: list[str]) -> PruneConfig:
        made: list[PruneConfig] = []

        def stop(config: PruneConfig) -> None:
            made.append(config)
            raise AdaPrunerError("far enough")

        monkeypatch.setattr("adapruner.run.options.with_defaults", stop)
        with pytest.raises(AdaPrunerError, match="far enough"):
            app(command, exit_on_error=False)
        return made[0]

    return resolve


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.name)
def test_a_recipe_is_valid_and_opens_with_its_command(recipe, resolved):
    name = recipe.name.removesuffix(".yaml")
    command = shlex.split(recipe.read_text().splitlines()[0].removeprefix("# "))
    options = {"model": "MODEL"} | yaml.safe_load(recipe.read_text())
    named = ["MODEL"] if options["model"] == "MODEL" else []  # those of the paper take any model
    assert command == ["adapruner", "prune", *named, "--recipe", name, "-o", f"runs/{name}"]
    assert resolved(command[1:]) == PruneConfig.from_options(**options, given=sorted(options))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.name)
def test_further_commands_of_a_recipe_are_accepted(recipe):
    for line in recipe.read_text().splitlines():
        if line.startswith("# adapruner"):
            app.parse_args(shlex.split(line.removeprefix("# adapruner ")), exit_on_error=False, print_error=False)


@pytest.mark.parametrize("recipe", MODELS)
def test_a_model_fits_as_its_recipe_says(recipe):
    """By shapes alone: the config of the released model, and no weights."""
    text = recipes()[recipe].replace("\n# ", " ")
    said = re.search(
        r"on (one|two) GPUs? of (\d+) GB, (in memory|layer by layer): .* needs (\d+) GiB on (?:the|each) GPU"
        r" and (\d+) GiB of main memory",
        text,
    )
    assert said
    options = {name: value for name, value in read_recipe(recipe).items() if name != "model"}
    estimated = estimate(CONFIGS / recipe, f"{ {'one': 1, 'two': 2}[said[1]] }x{said[2]}GB", **options)
    assert estimated.fits
    assert estimated.placement.layer_wise == (said[3] == "layer by layer")
    needed = estimated.memory.device, estimated.memory.host
    assert [math.ceil(size / GIB) for size in needed] == [int(said[4]), int(said[5])]


@pytest.mark.parametrize(
    ("recipe", "heads", "channels", "left"),
    [("paper-20", 24, 8256, 5_422_977_024), ("paper-50", 13, 4403, 3_350_188_032)],
)
def test_the_recipes_of_the_paper_leave_exactly_what_the_protocol_leaves(recipe, heads, channels, left):
    config = PruneConfig.from_options(**read_recipe(recipe), model="huggyllama/llama-7b")
    structure = build_structure(empty_model(LLAMA_7B))
    counts = kept_counts(structure, reference_budget(config, structure, config.ratio))
    kept = {(block.layer, block.kind): count for block, count in zip(structure.blocks, counts, strict=True)}
    middle = structure.layers // 2
    assert (kept[middle, "heads"], kept[middle, "channels"]) == (heads, channels)
    assert structure.total_parameters - structure.removed_parameters(counts) == left
    assert config.heal == "none"


def test_options_go_before_those_of_the_recipe(tmp_path, resolved):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: a/b\nratio: 0.3\nheal: 300k\n")
    config = resolved(["prune", "c/d", "--recipe", str(recipe), "-o", "x", "--trials", "9", "--heal", "2M"])
    assert (config.model, config.ratio, config.trials) == ("c/d", 0.3, 9)
    assert config.heal == "2000000"
    recipe.write_text("memory: 24GB\ncontext: 4k\nbatch: 2\n")
    config = resolved(["prune", "c/d", "--recipe", str(recipe), "-o", "x", "--ratio", "0.2"])
    assert config.ratio == 0.2


def test_an_effort_sets_options_that_are_not_given(tmp_path, resolved):
    plain = ["prune", "a/b", "-o", str(tmp_path / "run")]
    assert resolved(plain).trials == resolved([*plain, "--effort", "standard"]).trials
    quick = resolved([*plain, "--effort", "quick", "--trials", "30"])
    assert (quick.trials, quick.compensation_windows) == (30, 192)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: a/b\neffort: quick\ntrials: 5\npool: 20\n")
    of_recipe = resolved(["prune", "--recipe", str(recipe), "-o", str(tmp_path / "run")])
    assert (of_recipe.pool, of_recipe.compensation_windows) == (20, quick.compensation_windows)
    with pytest.raises(AdaPrunerError, match="`effort`"):
        PruneConfig.from_options(model="a/b", effort="fast")
