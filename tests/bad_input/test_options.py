"""Options out of range, that do not go together, or that there are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from annotated_types import Ge, Gt, Le, Lt
from transformers import PreTrainedTokenizerFast

from adapruner.config import PruneOptions, RecoveryOptions

Commands = Callable[[str | Path], dict[str, list[str]]]
Refused = Callable[..., str]


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def out_of_range(options: Any, prefix: str = "") -> list[tuple[str, str]]:
    """For every number, what lies just beyond its bounds, far beyond them, and what is no number."""
    cases = []
    for name, field in options.model_fields.items():
        kinds = set(get_args(field.annotation)) | {field.annotation}
        if not kinds & {int, float}:
            continue
        values = ["much", "nan", "inf", "9" * 5000, "", *(["2.5"] if int in kinds else [])]
        for bound in field.metadata:
            match bound:
                case Ge():
                    values += [str(bound.ge - 1)]
                case Gt():
                    values += [str(bound.gt), "-1"]
                case Le():
                    values += [str(bound.le + 1)]
                case Lt():
                    values += [str(bound.lt)]
        if float in kinds and not any(isinstance(bound, Le | Lt) for bound in field.metadata):
            values = [value for value in values if not value.startswith("9")]
        cases += [(f"{flag(prefix + name)}", value) for value in values]
    return cases


def without(option: str, command: list[str]) -> list[str]:
    """A command without an option, if it has it, and the value behind it."""
    if option not in command:
        return command
    place = command.index(option)
    return command[:place] + command[place + 2 :]


RATIOS = [("--ratio", value) for value in ("0", "1", "-1", "20", "much", "nan", "inf", "9" * 5000, "")]


@pytest.mark.parametrize(
    ("option", "value"),
    [*RATIOS, *out_of_range(PruneOptions), *out_of_range(RecoveryOptions, "recovery.")],
    ids=lambda text: text[:20],
)
def test_numbers_of_prune(
    option: str, value: str, refused: Refused, commands: Commands, model_folder: Path, tmp_path: Path
) -> None:
    command = without(option, commands(model_folder)["prune"])
    extra = ["--recover", "c4"] if option.startswith("--recovery.") else []
    refused([*command, *extra, option, value], option)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(("option", "value"), out_of_range(RecoveryOptions), ids=lambda text: text[:20])
def test_numbers_of_recover(
    option: str, value: str, refused: Refused, commands: Commands, model_folder: Path, tmp_path: Path
) -> None:
    command = without(option, commands(model_folder)["recover"])
    refused([*command, option, value], option)
    assert not (tmp_path / "output").exists()


def test_all_errors_at_once(refused: Refused, model_folder: Path, tmp_path: Path) -> None:
    """Those of single options; then those of options that conflict, which a recipe may hold too."""
    command = ["prune", str(model_folder), "-o", str(tmp_path / "run")]
    refused(
        [*command, "--ratio", "20", "--pool", "0", "--layout", "perlayer", "--recovery.epochs", "x"],
        "--ratio 20 is not a fraction between 0 and 1: 0.2 removes 20 %; ",
        "--pool 0 must be at least 1; ",
        "--layout perlayer is not one of per-layer, uniform: did you mean 'per-layer'?; ",
        "--recovery.epochs x is not a whole number",
    )
    refused(
        [*command, "--ratio", "0.1", "--alignment", "paper", "--ratio-of", "groups", "--recovery.epochs", "3"],
        "--alignment paper only knows the Taylor terms: set --space paper; ",
        "--ratio-of groups leaves no allocation to search: set --space paper; ",
        "options of the recovery need a dataset to fine-tune on: add --recover",
    )


NUMBERS = ("0", "-1", "2.5", "nan", "much", "9" * 30, "9" * 5000, "")


@pytest.mark.parametrize("value", NUMBERS, ids=lambda text: text[:20])
@pytest.mark.parametrize(
    ("verb", "option"),
    [
        *(("evaluate", f"--{name}") for name in ("seq-len", "stride", "limit")),
        *(("benchmark", f"--{name}") for name in ("batch-size", "prompt", "new-tokens", "repetitions")),
        ("plan", "--ratio"),
    ],
)
def test_numbers_of_other_verbs(
    verb: str, option: str, value: str, refused: Refused, commands: Commands, model_folder: Path, tmp_path: Path
) -> None:
    known = commands(model_folder) | {"plan": ["plan", str(tmp_path), "-o", str(tmp_path / "b")]}
    command = without(option, known[verb])
    refused([*command, option, value])


TOGETHER = [
    ["--samples", "9", "--pool", "8"],
    ["--layout", "uniform"],
    ["--ratio", "0.0001"],
    ["--layout", "uniform", "--ratio", "0.004", "--round-to", "32"],
    ["--alignment", "paper"],
    ["--calibration", "self", "--self-windows", "4"],
    ["--space", "paper", "--level-rounds", "1"],
    ["--ratio-of", "groups"],
    ["--compensation", "bias", "--sequential"],
    ["--recovery.steps", "5"],
    ["--recover", "self", "--recovery.method", "magic"],
    ["--layer-wise", "--no-layer-wise"],
    ["--ratio", "0.1", "--ratio", "0.1"],
    ["--evaluate", "self"],
    ["--tasks", ","],
    ["--tasks", ""],
    ["--head-granularity", "query-heads"],
    ["--device", "meta"],
    ["--device", "gpu"],
    ["--device", ""],
    ["--device", "cuda:99"],
    ["--device", "cpu:x"],
    ["--dtype", "int8"],
    ["--push-to-hub", "a/b/c"],
    ["--no-such-option"],
    ["--no-such-option", "3"],
    ["--json=maybe"],
    ["another-model"],
    ["--recipe", "no-such-recipe"],
    ["--protect-first", "9"],
    ["--seq-len", "100000"],
    ["--pool", "4000000000"],
    ["--round-to", "4000000000"],
    ["--ratio", "0.99"],
]


@pytest.mark.parametrize("extra", TOGETHER, ids=lambda extra: " ".join(extra))
def test_what_does_not_go_together(
    extra: list[str], refused: Refused, commands: Commands, model_folder: Path, tmp_path: Path
) -> None:
    command = commands(model_folder)["prune"]
    for option in {part for part in extra if part.startswith("--") and part in command}:
        place = command.index(option)
        del command[place : place + 2]
    refused([*command, *extra])
    assert not (tmp_path / "output" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("verb", "extra"),
    [
        ("recover", ["--method", "distillation"]),
        ("recover", ["--method", "labels", "--teacher", "MODEL"]),
        ("recover", ["--teacher", "nowhere/at/all"]),
        ("recover", ["--device", "meta"]),
        ("evaluate", ["--protocol", "magic"]),
        ("evaluate", ["--stride", "17"]),
        ("evaluate", ["--tasks", ","]),
        ("evaluate", ["--device", "meta"]),
        ("benchmark", ["--against", "nowhere/at/all"]),
        ("benchmark", ["--device", "meta"]),
        ("export", ["--to", "onnx"]),
        ("export", ["--gguf-type", "q2"]),
        ("export", ["--push-to-hub", "a/b/c"]),
        ("inspect", ["--ratio", "0.2"]),
        ("inspect", ["--cost", "--ratio", "2"]),
        ("inspect", ["--cost", "--device", "gpu"]),
        ("inspect", ["--cost", "--device", "meta"]),
        ("inspect", ["--no-such-option"]),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else part,
)
def test_what_other_verbs_do_not_take(
    verb: str, extra: list[str], refused: Refused, commands: Commands, model_folder: Path
) -> None:
    extra = [str(model_folder) if part == "MODEL" else part for part in extra]
    command = commands(model_folder)[verb]
    if extra[0] in command:
        place = command.index(extra[0])
        del command[place : place + 2]
    refused([*command, *extra])


@pytest.mark.parametrize(
    "arguments",
    [
        ["prun"],
        ["prune"],
        ["plan"],
        ["recover"],
        ["evaluate"],
        ["benchmark"],
        ["export"],
        ["inspect"],
        ["inspect", "a", "b"],
        ["no-such-verb", "--help-me"],
        ["--no-such-option"],
        [""],
        ["\x1b[2J\n"],
    ],
    ids=lambda arguments: ascii(" ".join(arguments)),
)
def test_commands_that_are_none(arguments: list[str], refused: Refused) -> None:
    refused(arguments)


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_texts_longer_than_learned_positions(
    model_type: str,
    make_model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    commands: Commands,
    refused: Refused,
    tmp_path: Path,
) -> None:
    make_model(model_type).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = commands(tmp_path / "model")
    for verb in ("prune", "recover", "evaluate"):
        command = made[verb]
        command[command.index("--seq-len") + 1] = "65"
        refused(command, f"this {model_type} has 64 positions and no more; texts of 65 tokens are too long")
    refused(
        [*made["benchmark"][:2], "--prompt", "60", "--new-tokens", "5"], "64 positions and no more; texts of 65 tokens"
    )
