"""Recipes: every one is valid and opens with its command; those of the paper leave what its protocol leaves."""

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from adapruner import AdaPrunerError, PruneConfig
from adapruner.budget.counts import Profile, kept_counts, reference_budget
from adapruner.cli import app, main
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
    if command[1] == "recover":
        assert command == ["adapruner", "recover", "RUN", "--recipe", name]
        app.parse_args(command[1:], exit_on_error=False, print_error=False)
        return
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


@pytest.mark.parametrize(
    ("recipe", "protected"),
    [
        ("paper-20", {32: (4, 2), 30: (4, 2), 18: (2, 1), 24: (3, 2), 28: (4, 2), 80: (10, 5), 3: (1, 1)}),
        ("paper-50", {32: (3, 1), 30: (3, 1), 18: (2, 1), 24: (2, 1), 28: (3, 1), 80: (8, 3), 3: (1, 1)}),
    ],
)
def test_other_depths_are_protected_in_proportion(recipe, protected):
    for layers, ends in protected.items():
        config = PruneConfig.from_options(**read_recipe(recipe), model="m")
        small = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4, "vocab_size": 8}
        structure = build_structure(empty_model(LlamaConfig(num_hidden_layers=layers, **small)))
        profile = reference_budget(config, structure, config.ratio).allocation
        assert isinstance(profile, Profile)
        assert (profile.protect_first, profile.protect_last) == ends


@pytest.mark.parametrize("recipe", ["paper-20", "paper-50"])
@pytest.mark.parametrize(
    ("layers", "options", "documents", "words", "message"),
    [
        (2, "", 200, 140, r"all 2 layers are protected \(1 first, 1 last\); lower --protect-first or"),
        (4, "--protect-first 9", 200, 140, r"all 4 layers are protected \(9 first, 1 last\)"),
        (4, "--samples 65", 200, 140, "--samples 65 is more than the 64 of --pool"),
        (4, "", 12, 140, r"(\d+) of \1 documents in .* have at least 128 tokens and give \1 windows, 64 are needed"),
        (4, "", 200, 127, "0 of .* documents in .* have at least 128 tokens and give 0 windows, 64 are needed"),
        (4, "--ratio 0.01 --round-to 24", 200, 140, "a ratio of 0.01 removes nothing"),
        (4, "--ratio 0.9 --ratio-of parameters", 200, 140, "with the first 1 and the last 1 of 4 layers protected, at"),
        (4, "--protect-first 1.5", 200, 140, "--protect-first 1.5 is neither a number of layers nor, below 1, a share"),
    ],
)
def test_what_the_protocol_cannot_do_is_refused_in_one_line(
    recipe, layers, options, documents, words, message, model_folder, tmp_path, capsys
):
    config = json.loads((model_folder / "config.json").read_text())
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"w{number % 90} w{number // 90} " * (words // 2) for number in range(documents)))
    command = ["prune", str(folder), "--recipe", recipe, "--calibration", str(text), "--evaluate", str(text)]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "-o", str(tmp_path / "run"), *options.split()])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


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
