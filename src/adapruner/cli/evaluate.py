"""adapruner evaluate"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from adapruner import verbs
from adapruner.cli._output import print_json
from adapruner.config import Dtype


def evaluate(
    model: str,
    /,
    *,
    perplexity: Annotated[tuple[str, ...], Parameter(negative="")] = ("wikitext2", "ptb"),
    seq_len: int = 128,
    limit: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Perplexity of a model, dense or pruned.

    Parameters
    ----------
    model:
        Hub id, model folder, .gguf file, or smollm2.
    perplexity:
        Text to evaluate on; may be repeated.
    seq_len:
        Tokens per window.
    limit:
        Take only so many windows of each text, evenly spaced.
    dtype:
        auto, float32, bfloat16 or float16.
    device:
        auto, cpu, cuda, …
    json:
        Print JSON on stdout instead of the table.
    """
    results = verbs.evaluate(model, perplexity, seq_len, limit, dtype, device)
    if json:
        print_json({"model": model, "perplexity": [result.as_json() for result in results]})
        return
    table = Table("perplexity", "protocol", title=model)
    for result in results:
        table.add_row(f"{result.perplexity:.2f}", result.protocol)
    Console().print(table)
