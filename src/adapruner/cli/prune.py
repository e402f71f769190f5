"""adapruner prune"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from adapruner import pipeline
from adapruner.cli._output import print_advice, print_json, print_result
from adapruner.config import PruneOptions
from adapruner.processes import this_process


def prune(
    model: str | None = None,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    recipe: str | None = None,
    options: Annotated[PruneOptions | None, Parameter(name="*")] = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    push_to_hub: str | None = None,
    storage: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Search, prune, save, train again if asked to, evaluate. The same command again goes on where it stopped.

    Parameters
    ----------
    model:
        Hub id, model folder, .gguf file, or smollm2; with a recipe, that of the recipe.
    output:
        Run folder; the pruned model is in its model/, the one trained afterwards in its recovered/.
    recipe:
        Options to start from: smollm2-20, llama-7b-20, llama-7b-50, vicuna-7b-20, vicuna-7b-50, or a YAML file. Options
        of the command go before them.
    overwrite:
        Start again from nothing, whatever run the folder holds.
    push_to_hub:
        Upload the model, recovered if it was, to this repository, owner/name.
    storage:
        URL of an SQL database that keeps the trials, postgresql://…, so that many machines work on them; by default a
        journal in the run folder.
    json:
        Print result.json on stdout instead of the table.
    """
    given = options.model_dump(exclude_unset=True) if options else {}
    result = pipeline.prune(model, output, overwrite, push_to_hub, recipe, storage, **given)
    if not this_process().leads:
        return
    print_advice(result.advice())
    if json:
        print_json(result.result)
        return
    print_result(result)
