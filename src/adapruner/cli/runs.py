"""The verbs of a run: prune, join, plan, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from adapruner.cli._options import Device, Flag, Json, Model, Output, Upload
from adapruner.cli._output import plain_console, print_advice, print_json, print_result
from adapruner.config import PruneOptions, Tracker


def prune(
    model: Model | None = None,
    /,
    *,
    output: Output,
    recipe: str | None = None,
    options: Annotated[PruneOptions | None, Parameter(name="*")] = None,
    overwrite: Flag = False,
    upload: Annotated[Upload | None, Parameter(name="*")] = None,
    storage: str | None = None,
    track: Tracker | None = None,
    json: Json = False,
) -> None:
    """Search, prune, save, fine-tune on request, and evaluate. Rerun the same command to resume.

    For several ratios, --json prints a list.

    Args:
        output: Run folder; the pruned model is saved in model/, the fine-tuned model in recovered/.
        recipe: Options to start from: smollm2-20, llama-7b-20, llama-7b-50, vicuna-7b-20, vicuna-7b-50, or a YAML file.
            Options of the command line override them; the model may be that of the recipe.
        overwrite: Rebuild what was made with other options, from another model or other text.
        storage: URL of an SQL database for the trials, postgresql://…, to search on many machines; by default a SQLite
            file in the run folder.
        track: Experiment tracker that gets trials, training curves, stage times and perplexities while they come;
            tensorboard writes into the run folder. By default nothing is sent.
    """
    from adapruner import pipeline
    from adapruner.processes import this_process

    given = (options.model_dump(exclude_unset=True) if options else {}) | (vars(upload) if upload else {})
    results = pipeline.prune_ratios(
        model, output=output, overwrite=overwrite, recipe=recipe, storage=storage, track=track, **given
    )
    if not this_process().leads:
        return
    print_advice([line for result in results for line in result.advice()])
    if json:
        contents = [result.result.model_dump(mode="json") for result in results]
        print_json(contents if len(contents) > 1 else contents[0])
    else:
        print_result(results)


def join(run: Path, /, *, storage: str | None = None, device: Device = "auto") -> None:
    """Join a run in progress as an additional worker.

    Args:
        run: Folder of the run, as seen by this machine.
        storage: Storage of the run, if it was started with one.
    """
    from adapruner import pipeline

    pipeline.join(run, storage, device)


def plan(run: Path, /, *, ratio: float, output: Output, overwrite: Flag = False, json: Json = False) -> None:
    """Prune to another ratio with the statistics and the best trial of a finished run.

    Args:
        run: Folder of the finished run.
        ratio: Fraction of all parameters to remove.
        output: Folder of the new run.
        overwrite: Rebuild what was made with other options, from another model or other text.
    """
    from adapruner import pipeline

    result = pipeline.plan_again(run, output, ratio, overwrite)
    print_advice(result.advice())
    if json:
        print_json(result.result.model_dump(mode="json"))
    else:
        plain_console().print(result.plan.explain())
        print_result([result])


def report(run: Path, /, *, open: Flag = False, watch: Flag = False, json: Json = False) -> None:
    """Write the report of a run, a self-contained page: report.html in the run folder.

    Args:
        run: Run folder; the report of an unfinished run shows what is available.
        open: Open the page in the browser.
        watch: Update the page every few seconds while the run is in progress; the open page reloads automatically.
    """
    import webbrowser

    from adapruner import verbs

    written = verbs.write_reports(run, watch)
    pages = next(written)
    if open:
        webbrowser.open(pages[-1].absolute().as_uri())
    if json:
        print_json({"run": str(run), "reports": [str(page) for page in pages]})
    else:
        plain_console().print(*(f"report: {page}" for page in pages), sep="\n", soft_wrap=True)
    for _ in written:
        pass
