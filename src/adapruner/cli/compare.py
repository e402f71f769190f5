"""The verb that compares models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from adapruner.cli._options import Device, Flag, Json, Names, WholeNumber
from adapruner.cli._output import print_output, starting
from adapruner.config import Engine


def compare(
    *models: Annotated[str, Parameter(help="Hub id, model folder, run folder, .gguf file, or smollm2.")],
    types: Names = ("f16", "q8_0", "q4_k_m"),
    engine: Annotated[tuple[Engine, ...], Parameter(negative="")] = ("llama.cpp",),
    evaluate: str = "wikitext2",
    seq_len: WholeNumber = 128,
    limit: WholeNumber | None = None,
    tasks: Names = (),
    prompt: WholeNumber = 128,
    new_tokens: WholeNumber = 32,
    repetitions: WholeNumber = 5,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    overwrite: Flag = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure quality, size and speed of several models and quantizations, and say which are dominated.

    ```console
    adapruner compare Qwen/Qwen3-0.6B runs/a -o compare.html
    adapruner compare Qwen/Qwen3-0.6B runs/a --types f16,q4_k_m --limit 64
    adapruner compare Qwen/Qwen3-0.6B runs/a --engine transformers --tasks piqa
    ```

    Args:
        types: Types of GGUF file that llama.cpp runs, comma-separated or repeated. A given .gguf file runs as it is.
        engine: What runs the models; may be repeated. transformers runs them in their dtype. llama.cpp runs GGUF files
            and needs pip install '.[gguf]' in a checkout.
        evaluate: Dataset for bits per byte.
        seq_len: Tokens per window of this dataset.
        limit: Maximum number of windows, and of items of each task, evenly spaced.
        tasks: Tasks of lm-eval, separated by commas or repeated; run by transformers.
        prompt: Tokens that are read at once to measure speed.
        new_tokens: Tokens that are then generated.
        repetitions: Number of timed runs; the median is reported.
        output: HTML page to write.
        overwrite: Replace an existing page.
    """
    with starting():
        from adapruner.comparison import table
        from adapruner.verbs import compare as run

    text, repeated = (evaluate, seq_len, limit), (prompt, new_tokens, repetitions)
    comparison = run(models, output, *text, types, engine, tasks, *repeated, overwrite, device)
    print_output(comparison, json, [table(comparison)])
