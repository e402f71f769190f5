"""adapruner prune"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from adapruner import pipeline
from adapruner.cli._output import print_json
from adapruner.config import PruneOptions


def prune(
    model: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    options: Annotated[PruneOptions | None, Parameter(name="*")] = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    push_to_hub: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Search, prune, save and evaluate a model. The same command again goes on where it stopped.

    Parameters
    ----------
    model:
        Hub id, model folder, .gguf file, or smollm2.
    output:
        Run folder; the pruned model is in its model/.
    overwrite:
        Start again from nothing, whatever run the folder holds.
    push_to_hub:
        Upload the pruned model to this repository, owner/name.
    json:
        Print result.json on stdout instead of the table.
    """
    options = options or PruneOptions()
    result = pipeline.prune(model, output, overwrite, push_to_hub, **options.model_dump())
    if json:
        print_json(result.result)
        return
    console = Console()
    console.print(*result.tables(), sep="\n")
    console.print(f"model: {result.model_folder}   plan {result.plan.hash[:12]}", highlight=False, soft_wrap=True)
