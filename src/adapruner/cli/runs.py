"""The verbs of a run: prune, plan, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from adapruner import config
from adapruner.cli._options import (
    MOST_USED,
    RUN_FOLDER,
    Flag,
    Json,
    Model,
    Output,
    PruneOptions,
    TargetOptions,
    given,
)
from adapruner.cli._output import preview_lines, print_advice, print_note, print_output, result_lines, starting
from adapruner.errors import AdaPrunerError
from adapruner.recipe import override, read_recipe


def prune(
    model: Model | None = None,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], group=MOST_USED)] = None,
    recipe: Annotated[str | None, Parameter(group=MOST_USED)] = None,
    dry_run: Annotated[Flag, Parameter(group=MOST_USED)] = False,
    options: Annotated[PruneOptions | None, Parameter(name="*")] = None,
    overwrite: Annotated[Flag, Parameter(group=RUN_FOLDER)] = False,
    json: Annotated[Json, Parameter(group=RUN_FOLDER)] = False,
) -> None:
    """Search, prune, save, fine-tune on request, and evaluate. Rerun the same command to resume.

    For several ratios, --json prints a list.

    ```console
    adapruner prune Qwen/Qwen3-0.6B --calibration c4 -o runs/a --dry-run
    adapruner prune Qwen/Qwen3-0.6B --ratio 0.2 --for llama.cpp -o runs/a
    adapruner prune Qwen/Qwen3-0.6B --ratio 0.1 --ratio 0.2 --recover c4
    ```

    Args:
        output: Run folder; the pruned model is saved in model/, the fine-tuned model in recovered/. By default
            runs/MODEL-RATIO.
        recipe: Options to start from: a recipe that adapruner recipes lists, or a YAML file. Options of the command
            line override them; the model may be that of the recipe.
        dry_run: Check the options and print the artifacts of the run, with sizes and memory; write nothing.
        overwrite: Rebuild artifacts of other options, another model or other text.
    """
    chosen = given(options)
    if output is None:
        output = _default_output(model, recipe, chosen)
        print_note(f"run folder: {output}")
    with starting():
        from adapruner.run import api, engines, preview
    if dry_run:
        previews = preview.preview_ratios(model, output=output, overwrite=overwrite, recipe=recipe, **chosen)
        print_output(_unwrapped(previews), json, preview_lines(previews))
        return
    results = api.prune_ratios(model, output=output, overwrite=overwrite, recipe=recipe, **chosen)
    print_advice([line for result in results for line in result.advice()])
    serving = [
        line for result in results for line in engines.serving_commands(result.result.config.for_, result.model_folder)
    ]
    shown = [*result_lines(results), *(f"serve: {line}" for line in serving)]
    print_output(_unwrapped([result.result for result in results]), json, shown)


def _default_output(model: str | None, recipe: str | None, options: dict[str, Any]) -> Path:
    """`runs/MODEL-RATIO`, with the last part of the name of the model and all ratios."""
    chosen = override(read_recipe(recipe) if recipe else {}, options)
    if not (model := model or chosen.get("model")):
        raise AdaPrunerError("name a model: Hub id, model folder, .gguf file, or smollm2")
    name = Path(str(model)).resolve().name.removesuffix(".gguf")
    budget = config.PruneOptions.from_options(**{key: chosen[key] for key in chosen if key in config.BUDGETS})
    amounts = (getattr(budget, budget.target),) if budget.target else budget.ratio
    unit = "x" if budget.target == "target_speed" else ""
    shown = (f"{amount:g}{unit}" if isinstance(amount, float) else amount for amount in amounts)
    return Path("runs", "-".join([name, *shown]))


def _unwrapped(contents: list[Any]) -> Any:
    """The list, or its only entry."""
    return contents if len(contents) > 1 else contents[0]


def plan(
    run: Path,
    /,
    *,
    output: Output,
    ratio: float | None = None,
    target: Annotated[TargetOptions | None, Parameter(name="*")] = None,
    overwrite: Flag = False,
    json: Json = False,
) -> None:
    """Prune to another ratio or target with the statistics and the best trial of a finished run.

    ```console
    adapruner plan runs/a --ratio 0.3 -o runs/b
    adapruner plan runs/a --target-size 400MB -o runs/small
    adapruner plan runs/a --target-speed 1.3 -o runs/fast
    ```

    Args:
        run: Folder of the finished run.
        output: Folder of the new run.
        ratio: Fraction of all parameters to remove.
        overwrite: Rebuild artifacts of other options, another model or other text.
    """
    with starting():
        from adapruner.run.again import plan_again

    result = plan_again(run, output, ratio, overwrite, **given(target))
    print_advice(result.advice())
    print_output(result.result, json, [result.plan.explain(), *result_lines([result])])


def report(run: Path, /, *, open: Flag = False, watch: Flag = False, json: Json = False) -> None:
    """Write the report of a run, a self-contained page: report.html in the run folder.

    ```console
    adapruner report runs/a
    adapruner report runs/a --open
    adapruner report runs/a --watch
    ```

    Args:
        run: Run folder; the report of an unfinished run shows what is available.
        open: Open the page in the browser.
        watch: Update the page every few seconds while the run is in progress; the open page reloads automatically.
    """
    import webbrowser

    with starting():
        from adapruner.verbs._report import write_reports

    written = write_reports(run, watch)
    pages = next(written)
    if open:
        webbrowser.open(pages[-1].absolute().as_uri())
    print_output({"run": run, "reports": pages}, json, [f"report: {page}" for page in pages])
    for _ in written:
        pass
