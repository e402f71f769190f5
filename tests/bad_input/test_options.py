"""Options out of range, that do not go together, or that there are not."""

import itertools
import shlex
from typing import Any, get_args

import pytest
from annotated_types import Ge, Gt, Le, Lt
from transformers import PreTrainedModel

from adapruner.options import PruneOptions, RecoveryOptions

# Errors that one message names.
NAMED = 8


def flag(name: str) -> str:
    return f"--{name.strip('_').replace('_', '-')}"


def out_of_range(options: Any) -> list[list[str]]:
    """For every number, what lies just beyond its bounds, far beyond them, and what is no number: as options of one
    command after the other, each with a value for as many as a message names."""
    values_of: dict[str, list[str]] = {}
    for name, field in options.model_fields.items():
        kinds = set(get_args(field.annotation)) | {field.annotation}
        if not kinds & {int, float}:
            continue
        values = ["much", "nan", "inf", "", *(["2.5"] if int in kinds else [])]
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
        if int in kinds or any(isinstance(bound, Le | Lt) for bound in field.metadata):
            values += ["9" * 5000]
        values_of[flag(name)] = values
    commands = []
    for values in itertools.zip_longest(*values_of.values()):
        given = [[option, value] for option, value in zip(values_of, values, strict=True) if value is not None]
        commands += [[*itertools.chain(*given[i : i + NAMED])] for i in range(0, len(given), NAMED)]
    return commands


RATIOS = [["--ratio", value] for value in ("0", "1", "-1", "20", "much", "nan", "inf", "9" * 5000, "")]
NUMBERS = ("0", "2.5", "much", "9" * 5000)
COUNTS = {
    "evaluate": ("seq-len", "stride", "limit"),
    "benchmark": ("batch-size", "prompt", "new-tokens", "repetitions"),
}


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        *(("prune", arguments) for arguments in (*RATIOS, *out_of_range(PruneOptions))),
        *(("recover", arguments) for arguments in out_of_range(RecoveryOptions)),
    ],
    ids=lambda part: part if isinstance(part, str) else " ".join(part)[:40],
)
def test_numbers_of_options(verb, arguments, refused, command, tmp_path):
    wrong = [part for part in arguments if part.startswith("--")]
    refused(command(verb, *arguments), *(f"{option} " for option in wrong))
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("value", NUMBERS, ids=lambda text: text[:20])
@pytest.mark.parametrize(("verb", "option"), [(verb, f"--{name}") for verb, names in COUNTS.items() for name in names])
def test_numbers_of_other_verbs(verb, option, value, refused, command):
    refused(command(verb, option, value))


def test_all_errors_at_once(refused, model_folder, tmp_path):
    """Those of single options; then those of options that conflict, which a recipe may hold too."""
    command = ["prune", str(model_folder), "-o", str(tmp_path / "run")]
    refused(
        [*command, "--ratio", "20", "--pool", "0", "--layout", "perlayer", "--round-to", "x"],
        "--ratio 20 is not a fraction between 0 and 1: 0.2 removes 20 %; ",
        "--pool 0 must be at least 1; ",
        "--layout perlayer is not one of per-layer, uniform: did you mean 'per-layer'?; ",
        "--round-to x is not a whole number",
    )
    refused(
        [*command, "--ratio", "0.1", "--alignment", "paper", "--ratio-of", "groups"],
        "--alignment paper only supports the Taylor terms: set --space paper; ",
        "--ratio-of groups leaves no allocation to search: set --space paper",
    )


# Options of a verb that are refused, with what is said of some; MODEL and TEXT stand for those of the command.
REFUSED: dict[str, list[tuple[str, str]]] = {
    "prune": [
        ("--ratio 0", "--ratio 0 is not a fraction between 0 and 1"),
        ("--ratio much", "--ratio much is not a number"),
        ("--ratio 0.95", "0.95 cannot be reached: with the first 1 and the last 1 of 4 layers protected, at most 0."),
        ("--ratio 0.1 --ratio 0.1", ""),
        ("--ratio-of groups", ""),
        ("--samples 9 --pool 8", "--samples 9 is more than the 8 of --pool"),
        ("--pool 5000", "the text is too short: "),
        ("--objective-windows 5000", "the text is too short: "),
        ("--seq-len 21", "0 of "),
        ("--seq-len 100000", ""),
        ("--layout uniform", "--layout uniform prunes all layers equally: remove --protect-first"),
        ("--layout uniform --ratio 0.004 --round-to 32", ""),
        ("--protect-first 4", "all 4 layers are protected"),
        ("--alignment paper", "--alignment paper only supports the Taylor terms: set --space paper"),
        ("--calibration wikitex2", "Did you mean 'wikitext2'"),
        ("--calibration TEXT@calibration --evaluate TEXT", "--objective would read"),
        ("--evaluate TEXT@objective", "--evaluate would read"),
        ("--evaluate TEXT@calibration", "--evaluate would read"),
        ("--evaluate nowhere.txt", "there is no file "),
        ("--evaluate mix", "is for calibration and training alone"),
        ("--tasks ,", ""),
        ("--tasks ''", ""),
        ("--calibration mix:1,TEXT", "must leave something to datasets without a share"),
        ("--calibration answers:TEXT", "is for fine-tuning: name the dataset itself"),
        ("--heal 2X", "is not a number of tokens"),
        ("--heal 9999B", "--heal 9999B is not a number of tokens: expected one such as 300k, 2M or 1_000_000, at most"),
        ("--head-granularity query-heads", ""),
        ("--layer-wise --no-layer-wise", ""),
        ("--dtype int8", "--dtype"),
        ("--device meta", ""),
        ("--device gpu", "--device gpu: "),
        ("--device ''", ""),
        ("--device cuda:99", ""),
        ("--device cpu:x", ""),
        ("--no-such-option", ""),
        ("--no-such-option 3", ""),
        ("--trails 3", "Unknown option: --trails"),
        ("--json=maybe", ""),
        ("another-model", ""),
        ("--recipe no-such-recipe", ""),
    ],
    "recover": [
        ("--tokens 2X", "is not a number of tokens: expected one such as 300k, 2M or 1_000_000"),
        ("--tokens 0", "is not a number of tokens"),
        ("--steps 3 --epochs 1", "each say how long the training is: give one"),
        ("--teacher-top 8", "add --teacher"),
        ("--label-weight 1 --teacher MODEL", "nothing is learnt from a teacher"),
        ("--label-weight 2 --teacher MODEL", ""),
        ("--teacher nowhere/at/all", ""),
        ("--device meta", ""),
    ],
    "evaluate": [
        ("--protocol magic", ""),
        ("--seq-len 1", "1"),
        ("--limit 0", "0"),
        ("--stride 17", ""),
        ("--tasks ,", ""),
        ("--dtype int8", "int8"),
        ("--device gpu", "gpu"),
        ("--device meta", ""),
    ],
    "benchmark": [("--against nowhere/at/all", ""), ("--device meta", "")],
    "export": [
        ("--to onnx", "onnx"),
        ("--to gguf", "llama"),  # biases, and a vocabulary of words
        ("--gguf-type q2", ""),
    ],
    "inspect": [
        ("--ratio 0.2", ""),
        ("--cost --ratio 2", ""),
        ("--cost --device gpu", ""),
        ("--cost --device meta", ""),
        ("--no-such-option", ""),
    ],
}


@pytest.mark.parametrize(
    ("verb", "extra", "message"),
    [(verb, *case) for verb, cases in REFUSED.items() for case in cases],
    ids=lambda text: text if " " in text or "--" in text else "",
)
def test_options_that_are_refused(
    verb, extra, message, refused, command, model_folder, text_file, tmp_path, monkeypatch
):
    """Before a run loads any weights."""
    if verb == "prune":
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    arguments = shlex.split(extra.replace("MODEL", str(model_folder)).replace("TEXT", str(text_file)))
    refused(command(verb, *arguments), message)
    assert not (tmp_path / "output" / "config.yaml").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["prun"],
        ["prune"],
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
def test_commands_that_are_none(arguments, refused):
    refused(arguments)


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_texts_longer_than_learned_positions(model_type, make_model, tokenizer, command, refused, tmp_path):
    make_model(model_type).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for verb in ("prune", "recover", "evaluate"):
        arguments = command(verb, "--seq-len", "65", model=tmp_path / "model")
        refused(arguments, f"this {model_type} has 64 positions and no more; texts of 65 tokens are too long")
    arguments = command("benchmark", "--prompt", "60", "--new-tokens", "5", model=tmp_path / "model")
    refused(arguments, "64 positions and no more; texts of 65 tokens")
