"""Run configs and recipes that are broken or not what they seem."""

import itertools
from typing import Any

import pytest
import yaml

from adapruner.base.errors import AdaPrunerError
from adapruner.options import PruneConfig, RecoverConfig


def bomb(levels: int) -> str:
    """A few lines of YAML that stand for 9 ** levels values."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"ratio: *a{levels - 1}"])


def merging_bomb(levels: int) -> str:
    lines = ["a0: &a0 {ratio: 0.2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join([*lines, f"<<: *a{levels - 1}"])


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "a word": b"ratio",
    "a list": b"- ratio: 0.2\n",
    "two documents": b"ratio: 0.2\n---\nratio: 0.3\n",
    "cut off": b"model: smollm2\nevaluate: [a",
    "tabs": b"model:\n\t- a\n",
    "binary": bytes(range(256)),
    "utf-16": "model: smollm2\n".encode("utf-16"),
    "a pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}\x94.",
    "an object of Python": b"!!python/object/apply:os.system ['false']\n",
    "a function as value": b"model: !!python/name:os.system\n",
    "an unknown tag": b"model: !secret x\n",
    "aliases": b"model: &a smollm2\ncalibration: *a\n",
    "an alias to itself": b"model: &a [*a]\n",
    "a bomb of aliases": bomb(40).encode(),
    "a bomb of merges": merging_bomb(40).encode(),
    "endless nesting": b"model: " + b"[" * 500,
    "a date that is none": b"model: smollm2\nratio: 2024-13-45\n",
    "no date of its type": b"model: smollm2\nratio: !!timestamp abc\n",
    "a number as name": b"1: 2\nmodel: smollm2\n",
    "no name": b"~: 2\nmodel: smollm2\n",
    "an unknown name": b"model: smollm2\nratoi: 0.2\n",
    "the name of an argument": b"model: smollm2\ncls: 1\n",
    "no model": b"ratio: 0.2\n",
    "a number as model": b"model: 7\n",
    "no value for the model": b"model:\n",
    "a word as ratio": b"model: smollm2\nratio: much\n",
    "no ratio": b"model: smollm2\nratio: []\n",
    "no number as ratio": b"model: smollm2\nratio: .nan\n",
    "a long number": b"model: smollm2\nseed: " + b"9" * 10_000 + b"\n",
    "a huge number": b"model: smollm2\nseed: 18446744073709551616\n",
    "a negative seed": b"model: smollm2\nseed: -1\n",
    "an unknown choice": b"model: smollm2\nlayout: diagonal\n",
    "a word as tokens": b"model: smollm2\nheal: long\n",
    "an option of an earlier version": b"model: smollm2\nrecover: c4\n",
    "options that need another": b"model: smollm2\nratio_of: groups\n",
    "options that do not go together": b"model: smollm2\nlayout: uniform\nprotect_first: 2\n",
    "control characters": b'model: smollm2\n"\\e[2J\\n\\n": 1\n',
    "a long value": b"model: smollm2\nratio: " + b"x" * 100_000 + b"\n",
}


# What is said of some of them.
SAID = {
    "a list": "is not a mapping of options",
    "cut off": "cannot read the recipe",
    "an unknown name": "`ratoi` is not an option: did you mean",
    "a word as tokens": "--heal long is not a number of tokens",
    "no model": "name a model",
    "an option of an earlier version": "`recover` is not an option",
    "options that need another": "set --space paper",
}


@pytest.mark.parametrize("name", BROKEN)
def test_recipes(name, refused, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(BROKEN[name])
    message = refused(["prune", "--recipe", str(recipe), "-o", str(tmp_path / "run")], SAID.get(name, ""))
    assert len(message) < 1100
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--sources", "--architectures"])
@pytest.mark.parametrize("name", [name for name in BROKEN if "alias" in name or "bomb" in name or "date" in name])
def test_other_files_of_yaml(name, option, command, refused, tmp_path):
    file = tmp_path / "file.yaml"
    file.write_bytes(BROKEN[name])
    refused(command("prune", option, str(file)), str(file), "alias" if b"*a" in BROKEN[name] else "")


# Both read a config by the same way: the cases take turns.
@pytest.mark.parametrize(
    ("content", "is_earlier"),
    list(zip(BROKEN.values(), itertools.cycle((False, True)), strict=False)),
    ids=BROKEN.keys(),
)
def test_configs_of_runs(content, is_earlier, refused, tmp_path, command):
    run = tmp_path / "output"
    run.mkdir()
    (run / "config.yaml").write_bytes(content)
    (run / "search.json").write_text("{}")
    arguments = ["prune", "--from", str(run), "-o", str(tmp_path / "b")] if is_earlier else command("prune")
    refused(arguments, f"{run}/config.yaml is not the config of a run")
    assert (run / "config.yaml").read_bytes() == content


def refusal(options: Any, **values: Any) -> str:
    with pytest.raises(AdaPrunerError) as refused:
        options.from_options(**values)
    return str(refused.value)


def test_all_errors_of_a_config_at_once():
    """And what excludes what, once the options are valid one by one."""
    assert refusal(PruneConfig, ratio="much", samples=100, layout="round", protect_first=1, learning_rate=0) == (
        "`ratio` much is not a number; `layout` round is not one of per-layer, uniform; `model` is missing;"
        " `learning_rate` is not an option"
    )
    assert refusal(RecoverConfig, data="d", teacher_top=8, steps=0, stesp=1) == (
        "`steps` 0 must be at least 1; `model` is missing; `stesp` is not an option: did you mean `steps`?"
    )
    assert refusal(RecoverConfig, model="m", data="d", teacher_top=8, steps=1, tokens="2k") == (
        "`steps`, `epochs` and `tokens` each say how long the training is: give one;"
        " `teacher_top` needs the dense model: add `teacher`"
    )


def test_many_errors_are_cut_short():
    message = refusal(PruneConfig, model="m", **{f"no_{number}": "x" * 1000 for number in range(100)})
    assert message.count("is not an option") == 8
    assert message.endswith("; and 92 more")


def test_the_alias_bombs_are_bombs():
    """What is refused at once would otherwise take more than there is."""
    small = yaml.safe_load(bomb(4))["ratio"]
    assert sum(len(two) for one in small for two in one) == 9**3
    assert yaml.safe_load(merging_bomb(3))["ratio"] == 0.2


def test_files_that_cannot_be_read(refused, tmp_path, command):
    for name in ("nowhere.yaml", str(tmp_path), "/dev/null", "a" * 5000, "\x1b[2J"):
        refused(["prune", "--recipe", name, "-o", str(tmp_path / "run")], *(["no recipe"] if len(name) < 5000 else []))
    run = tmp_path / "output"
    (run / "config.yaml").mkdir(parents=True)
    refused(command("prune"), "holds no run")
