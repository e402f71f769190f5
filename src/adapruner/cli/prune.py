"""adapruner prune"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from adapruner.cli._output import print_advice, print_json, print_result
from adapruner.config import PruneOptions


def prune(
    model: str | None = None,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    recipe: str | None = None,
    options: Annotated[PruneOptions | None, Parameter(name="*")] = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    push_to_hub: str | None = None,
    hub_private: bool = True,
    hub_revision: str | None = None,
    hub_token: str | None = None,
    storage: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Search, prune, save, fine-tune on request, and evaluate. Rerun the same command to resume.

    Parameters
    ----------
    model:
        Hub id, model folder, .gguf file, or smollm2; by default the model of the recipe.
    output:
        Run folder; the pruned model is saved in model/, the fine-tuned model in recovered/.
    recipe:
        Options to start from: smollm2-20, llama-7b-20, llama-7b-50, vicuna-7b-20, vicuna-7b-50, or a YAML file.
        Options of the command line override them.
    overwrite:
        Rebuild what was made with other options, from another model or other text.
    push_to_hub:
        Upload the final model to this repository of the Hub, owner/name.
    hub_private:
        Create that repository as a private one.
    hub_revision:
        Branch of that repository to upload to.
    hub_token:
        Token of the Hub; by default the token of the login.
    storage:
        URL of an SQL database for the trials, postgresql://…, to search on many machines; by default a SQLite file
        in the run folder.
    json:
        Print result.json on stdout instead of the tables; a list of them for several ratios.
    """
    from adapruner import pipeline
    from adapruner.processes import this_process

    given = options.model_dump(exclude_unset=True) if options else {}
    results = pipeline.prune_ratios(
        model,
        output,
        overwrite,
        push_to_hub,
        recipe,
        storage,
        hub_private=hub_private,
        hub_revision=hub_revision,
        hub_token=hub_token,
        **given,
    )
    if not this_process().leads:
        return
    print_advice([line for result in results for line in result.advice()])
    if json:
        contents = [result.result.model_dump(mode="json") for result in results]
        print_json(contents if len(contents) > 1 else contents[0])
        return
    print_result(results)
