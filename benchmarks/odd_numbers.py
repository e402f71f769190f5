"""Runs with numbers at the edge: each ends with a right result, or is refused in one line.

    OMP_NUM_THREADS=1 python benchmarks/odd_numbers.py --runs 200

Drawn at random: ratios from 0.001 to beyond the largest that is possible, one to five trials, windows from two tokens
on, float32, bfloat16 and float16, models of which a tensor is infinite, NaN, zero, huge or tiny in one place or
altogether, and models whose logits are constant. Of a finished run, the share of removed parameters, the losses and the
logits of the saved model are checked; `plan` at the ratio of the run gives its plan, and at another ratio, after a
search with one trial, that of a run at that ratio, if both remove the same share from heads. In a fifth of the folders,
another seed and then this one overwrite the run, which gives its plan again.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from cyclopts import run as run_benchmark
from transformers import LlamaForCausalLM

import adapruner
from adapruner.planning import RATIO_TOLERANCE
from machine import describe
from random_use import call, flags, quickly, shared

_OPTIONS: dict[str, object] = {
    "calibration": "TEXT",
    "pool": 4,
    "samples": 2,
    "objective-windows": 4,
    "final-windows": 2,
    "round-to": 1,
    "compensation-windows": 8,
    "self-windows": 2,
}
TENSORS = ("embed_tokens", "q_proj", "o_proj", "gate_proj", "down_proj", "layernorm", "norm", "lm_head")
VALUES = {"inf": float("inf"), "nan": float("nan"), "zero": 0.0, "huge": 1e30, "tiny": 1e-30}


@dataclass(frozen=True)
class Case:
    """A run: how much of which tensors has which value, the dtype of the model, and the options."""

    where: str
    tensor: str
    value: str
    dtype: str
    options: tuple[tuple[str, object], ...]

    @property
    def kind(self) -> str:
        return "sound" if self.where == "none" else f"{self.where} {self.value}"


def draw(generator: random.Random) -> Case:
    options: dict[str, object] = {
        "ratio": generator.choice([0.001, 0.004, 0.05, 0.1, 0.25, 0.5, 0.9, round(generator.uniform(0.001, 0.8), 4)]),
        "trials": generator.choice([1, 1, 2, 5]),
        "seq-len": generator.choice([2, 2, 3, 16]),
        "dtype": generator.choice(["auto", "bfloat16", "float16", "float32"]),
    }
    options |= generator.choice([{}, {"compensation": "none"}, {"selection": "kl"}, {"level-rounds": 0}])
    where = generator.choice(["none", "one", "all"])
    tensor, value = generator.choice(TENSORS), generator.choice(sorted(VALUES))
    return Case(where, tensor, value, generator.choice(["float32", "bfloat16", "float16"]), tuple(options.items()))


def write_broken(case: Case, folder: Path, generator: random.Random) -> None:
    """A copy of the shared model with the numbers of a case."""
    model = LlamaForCausalLM.from_pretrained(shared() / "model")
    names = sorted(name for name, _ in model.named_parameters() if case.tensor in name)
    weights = model.get_parameter(generator.choice(names)).data
    if case.where == "all":
        weights.fill_(VALUES[case.value])
    elif case.where == "one":
        weights.view(-1)[generator.randrange(weights.numel())] = VALUES[case.value]
    shutil.copytree(shared() / "model", folder, dirs_exist_ok=True)
    model.to(getattr(torch, case.dtype)).save_pretrained(folder)


def command(model: Path, output: Path, options: Mapping[str, object]) -> list[str]:
    return ["prune", str(model), "-o", str(output), *flags({**_OPTIONS, **options}, shared() / "text.txt")]


def check(case: Case, folder: Path, generator: random.Random) -> str:
    """The outcome of a case: `pruned`, or the line that refused it.

    Raises:
        AssertionError: the result is wrong, or the command ended otherwise.
    """
    model, options = folder / "model", dict(case.options)
    write_broken(case, model, generator)
    outcome = call(command(model, folder / "run", options))
    if outcome.code != 0:
        assert outcome.code == 2, outcome
        causes = ("cannot be reached", "removes nothing", "float16")
        assert case.where != "none" or any(cause in outcome.last for cause in causes), outcome
        if most := re.search(r"at most ([\d.]+) of the", outcome.last):
            check_largest(model, folder / "largest", options, float(most[1]))
        return outcome.last
    check_result(folder / "run", float(str(options["ratio"])), case.where == "none")
    check_plans(model, folder, options)
    if generator.random() < 0.2:
        check_overwritten(model, folder / "run", options)
    return "pruned"


def check_largest(model: Path, output: Path, options: dict[str, object], largest: float) -> None:
    """What a message calls the largest ratio can be reached."""
    outcome = call(command(model, output, options | {"ratio": round(largest - 0.0005, 4)}))
    assert "cannot be reached" not in outcome.last, (outcome, largest)


def check_result(run: Path, ratio: float, is_sound: bool) -> None:
    result = json.loads((run / "result.json").read_text())
    dense, pruned = (next(it for it in result["models"] if it["role"] == role) for role in ("dense", "searched"))
    assert abs(1 - pruned["parameters"] / dense["parameters"] - ratio) <= RATIO_TOLERANCE, (pruned, dense, ratio)
    # With a broken weight, the perplexity of text that needs it is no number.
    assert not is_sound or "NaN" not in (run / "result.json").read_text()
    model = adapruner.load(run / "model")
    assert model.num_parameters() == pruned["parameters"]
    assert torch.isfinite(model(torch.arange(4, 90)[None]).logits).any()


def check_plans(model: Path, folder: Path, options: dict[str, object]) -> None:
    """The plan of a run again, and with one trial that of another ratio."""
    ratio, run = float(str(options["ratio"])), folder / "run"
    again = call(["plan", str(run), "--ratio", str(ratio), "-o", str(folder / "again")])
    assert again.code == 0, again
    assert plan(folder / "again") == plan(run)
    if options["trials"] != 1:
        return
    other = round(0.7 * ratio + 0.01, 4)
    planned, pruned = (
        call(["plan", str(run), "--ratio", str(other), "-o", str(folder / "planned")]),
        call(command(model, folder / "pruned", options | {"ratio": other})),
    )
    assert planned.code == pruned.code, (planned, pruned)
    # The share of heads is chosen at the ratio of the search.
    if planned.code == 0 and head_share(folder / "planned") == head_share(folder / "pruned"):
        assert plan(folder / "planned") == plan(folder / "pruned"), other


def head_share(run: Path) -> object:
    return json.loads((run / "search.json").read_text())["best"]["budget"]["heads"]


def check_overwritten(model: Path, run: Path, options: dict[str, object]) -> None:
    before = plan(run)
    for seed in (1, 0):
        outcome = call([*command(model, run, options | {"seed": seed}), "--overwrite"])
        assert outcome.code == 0, outcome
    assert plan(run) == before


def plan(run: Path) -> object:
    return json.loads((run / "plan.json").read_text())


def try_numbers(runs: int, seed: int, minutes: float = math.inf) -> Iterator[tuple[str, bool]]:
    """The outcomes by kind of weights, and whether each is right; in at most so many minutes."""
    end = time.monotonic() + 60 * minutes
    with quickly():
        for number in range(runs):
            if time.monotonic() > end:
                break
            generator = random.Random(f"{seed}/{number}")
            case = draw(generator)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    outcome = re.sub(r"/\S+|'[^']*'|[\d,.]+", "…", check(case, Path(folder), generator))[:110]
                    yield f"{case.kind}: {outcome}", True
                except Exception as error:
                    yield f"{number}: {case}: {type(error).__name__}: {error}", False


def main(*, runs: int = 200, seed: int = 0, minutes: float = math.inf) -> None:
    """Prints the outcomes; ends with code 1 if one was wrong.

    Args:
        minutes: after which no further run begins.
    """
    print(describe(), flush=True)
    outcomes, wrong = Counter[str](), 0
    for outcome, is_right in try_numbers(runs, seed, minutes):
        wrong += not is_right
        if is_right:
            outcomes[outcome] += 1
        else:
            print(outcome, flush=True)
    print(*(f"{count:5} {outcome}" for outcome, count in sorted(outcomes.items())), sep="\n")
    print(f"{outcomes.total()} runs ended as they must, {wrong} did not")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    run_benchmark(main)
