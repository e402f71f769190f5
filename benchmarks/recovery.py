"""What training a pruned model again brings, by what it is trained on and how, for the same number of tokens.

    ADAPRUNER_DATA=.data:DATA python benchmarks/recovery.py --pruned RUN/model --output runs/recovery --instructions F

Perplexities and accuracies go to results.jsonl, a line per model; rerun to resume, also in the middle of
a training. At the end, the table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, run

from adapruner import verbs


@dataclass(frozen=True)
class Training:
    """A way to train: on what, from which teacher, with which options."""

    data: str
    teacher: str | None
    options: dict[str, Any]


def main(
    *,
    pruned: Path,
    output: Path,
    instructions: str,
    text: str = "boolq-passages@calibration",
    dense: str = "smollm2",
    tokens: int = 120_000,
    learning_rates: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (1e-3,),
    methods: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (
        "labels on instructions",
        "distillation on text",
        "labels on text",
        "distillation on instructions",
    ),
    perplexity: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (
        "boolq-passages@report",
        "wikitext2:validation",
        "ptb",
    ),
    tasks: str = "commonsense",
    limit: int = 200,
    windows: int = 64,
    dtype: str = "bfloat16",
) -> None:
    """Trains and evaluates what results.jsonl does not hold yet.

    Args:
        tokens: of each training, those of prompts included.
        limit: items of each task; 0 leaves the tasks out.
        windows: of each text.
        dtype: of the models while they are evaluated.
    """
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.jsonl"
    evaluated: dict[str, Path | str] = {"dense": dense, "pruned": pruned}
    for rate in learning_rates:
        for method in methods:
            folder = output / f"{method.replace(' ', '-')}-{rate:g}"
            training = _training(method, text, instructions, dense, rate, tokens)
            record = verbs.recover(pruned, training.data, folder, training.teacher, **training.options)
            print(
                method,
                rate,
                {name: getattr(record, name) for name in ("steps", "tokens", "loss_before", "loss_after", "seconds")},
            )
            evaluated[f"{method}, {rate:g}"] = folder
    for name, model in evaluated.items():
        done = [json.loads(line)["model"] for line in results.read_text().splitlines()] if results.exists() else []
        if name not in done:
            with results.open("a") as file:
                file.write(
                    json.dumps({"model": name, **_evaluated(model, perplexity, tasks, limit, windows, dtype)}) + "\n"
                )
    _print_table(results)


def _training(method: str, text: str, instructions: str, dense: str, rate: float, tokens: int) -> Training:
    how, _, what = method.partition(" on ")
    data = instructions if what == "instructions" else text
    options: dict[str, Any] = {
        "tokens": tokens,
        "learning_rate": rate,
        "seq_len": 256 if what == "instructions" else 128,
        "batch_size": 16,
        "micro_batch_size": 8,
        "validation": 32,
        # On a CPU, drawing the dropout of the adapters takes a third of a step.
        "lora_dropout": 0.0,
    }
    return Training(data, dense if how == "distillation" else None, options)


def _evaluated(
    folder: Path | str, perplexity: tuple[str, ...], tasks: str, limit: int, windows: int, dtype: Any
) -> dict[str, Any]:
    of_text = verbs.evaluate(folder, perplexity, limit=windows, dtype=dtype)
    of_tasks = verbs.evaluate(folder, tasks=[tasks], limit=limit, dtype=dtype) if limit else verbs.Evaluation([], [])
    return {
        "perplexity": {one.text: one.perplexity for one in of_text.perplexity},
        "tasks": {score.task: score.metrics for score in of_tasks.tasks},
        "means": of_tasks.mean_accuracies,
    }


def _print_table(results: Path) -> None:
    """Markdown: perplexities and accuracies of every model."""
    for entry in map(json.loads, results.read_text().splitlines()):
        cells = [f"{value:.1f}" for value in entry["perplexity"].values()]
        cells += [" / ".join(f"{100 * value:.1f}" for value in metrics.values()) for metrics in entry["tasks"].values()]
        cells += [f"{100 * value:.1f}" for value in entry["means"].values()]
        print(f"| {entry['model']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run(main)
