"""Quality against processor time: runs with different options, each from nothing, then fine-tuned on some tokens.

Makes "Less effort" of research/results.md. Takes 14 minutes (quick) to 73 (thorough) for each run.

    ADAPRUNER_DATA=.data:DATA OMP_NUM_THREADS=1 python benchmarks/frontier.py OUT --points quick standard --seeds 0 1 2

A point is a value of `--effort`, or options in the form of the command line: `"--trials 12 --level-rounds 0"`. Every
row is written to OUT/frontier.jsonl when it is done, and is not measured again: processor seconds of the run, and the
perplexity of the pruned model on each text as a multiple of the dense model's; with `--tokens`, once more after that
much fine-tuning with the same data, options and teacher.
"""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, run as run_benchmark

import adapruner
from machine import describe

TEXTS = ("boolq-passages@report", "wikitext2:validation", "ptb:validation")
TRAINING: dict[str, Any] = {
    "train": "full",
    "learning_rate": 1.5e-4,
    "label_weight": 0.4,
    "seq_len": 128,
    "batch_size": 16,
    "warmup_steps": 20,
}
Several = Parameter(consume_multiple=True)


def main(
    output: Path,
    /,
    *,
    points: Annotated[tuple[str, ...], Several] = ("quick", "standard", "thorough"),
    seeds: Annotated[tuple[int, ...], Several] = (0,),
    tokens: Annotated[tuple[int, ...], Several] = (),
    model: str = "smollm2",
    ratio: float = 0.2,
    calibration: str = "boolq-passages",
    data: str = "boolq-passages@calibration",
    windows: int = 192,
) -> None:
    """Measures every point with every seed.

    Args:
        tokens: of fine-tuning, for each of which the pruned model is trained from its start.
        data: what is learnt.
        windows: of each text, evenly spaced.
    """
    print(describe())
    output.mkdir(parents=True, exist_ok=True)
    results = output / "frontier.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(row["point"], row["seed"], row["tokens"]) for row in rows}
    dense = perplexities(model, windows)
    for seed in seeds:
        for number, point in enumerate(points):
            run = output / f"{number}-{seed}"
            options = shlex.split(point if point.startswith("-") else f"--effort {point}")
            shared = ["--ratio", str(ratio), "--calibration", calibration, "--seed", str(seed)]
            used = processor_seconds("prune", model, "-o", run, *shared, *options)
            for length in (0, *tokens):
                if (point, seed, length) in done:
                    continue
                trained, seconds = run / "model", used
                if length:
                    trained = run / f"after-{length}"
                    flags = (f"--{name.replace('_', '-')}={value}" for name, value in TRAINING.items())
                    recovery = [*flags, "--tokens", length, "--data", data, "--teacher", model]
                    seconds = used + processor_seconds("recover", run / "model", "-o", trained, *recovery)
                times = {text: value / dense[text] for text, value in perplexities(str(trained), windows).items()}
                row = {"point": point, "seed": seed, "tokens": length, "seconds": round(seconds), "times dense": times}
                with results.open("a") as file:
                    print(json.dumps(row), file=file)
                print(json.dumps(row), flush=True)


def processor_seconds(*arguments: object) -> float:
    """Of the command line with these arguments, over all its threads; 0 if there is nothing left to do."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "adapruner", "--quiet", *map(str, arguments)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def perplexities(model: str, windows: int) -> dict[str, float]:
    """By text."""
    measured = adapruner.evaluate(model, TEXTS, limit=windows, dtype="bfloat16").perplexity
    return {text: number.perplexity for text, number in zip(TEXTS, measured, strict=True)}


if __name__ == "__main__":
    run_benchmark(main)
