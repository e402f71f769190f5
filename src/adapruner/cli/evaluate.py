"""adapruner evaluate"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from adapruner.cli._numbers import WholeNumber
from adapruner.cli._output import plain_console, print_advice, print_json
from adapruner.config import Dtype


def evaluate(
    model: str,
    /,
    *,
    perplexity: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    protocol: str | None = None,
    seq_len: WholeNumber = 128,
    stride: WholeNumber | None = None,
    tasks: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    limit: WholeNumber | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Perplexity of a model, dense or pruned, and what it scores in tasks of lm-eval.

    Parameters
    ----------
    model:
        Hub id, model folder, .gguf file, or smollm2.
    perplexity:
        Dataset to evaluate on; may be repeated.
    protocol:
        Perplexity as others report it. llm-pruner: WikiText2 test and PTB validation, 128 tokens; the default if no
        dataset and no task is named. 2048: WikiText2 test, 2048 tokens.
    seq_len:
        Tokens per window of these datasets.
    stride:
        Tokens between the beginnings of these windows; by default they do not overlap.
    tasks:
        Tasks of lm-eval, separated by commas or repeated; commonsense is the seven of the paper.
    limit:
        Take only so many windows of each dataset and items of each task, evenly spaced.
    dtype:
        auto, float32, bfloat16 or float16.
    device:
        auto, cpu, cuda, …
    json:
        Print JSON to stdout instead of tables.
    """
    from adapruner import verbs

    result = verbs.evaluate(model, perplexity, protocol, seq_len, stride, tasks, limit, dtype, device)
    print_advice(result.overlaps)
    if json:
        print_json(
            {
                "model": model,
                "perplexity": [one.model_dump(mode="json") for one in result.perplexity],
                "tasks": [score.model_dump(mode="json") for score in result.tasks],
                "task_means": result.mean_accuracies,
                "overlaps": result.overlaps,
            }
        )
        return
    console = plain_console()
    if result.perplexity:
        table = Table("perplexity", "protocol", title=model)
        for one in result.perplexity:
            table.add_row(f"{one.perplexity:.2f}", one.protocol)
        console.print(table)
    if result.tasks:
        table = Table("task", "metric", "score", "± standard error", title=model, caption_justify="left")
        for score in result.tasks:
            for metric, value in score.metrics.items():
                error = score.standard_errors.get(metric)
                table.add_row(score.task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
        for metric, value in result.mean_accuracies.items():
            table.add_row("mean", metric, f"{value:.4f}", "")
        table.caption = "\n".join(score.protocol for score in result.tasks)
        console.print(table)
