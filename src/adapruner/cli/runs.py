"""The verbs of a run: prune and report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from adapruner import config
from adapruner.cli._options import MOST_USED, RUN_FOLDER, Flag, Json, Model, PruneOptions, SizeLimit, given
from adapruner.cli._output import memory_line, print_advice, print_note, print_output, starting, where
from adapruner.errors import AdaPrunerError
from adapruner.recipe import override, read_recipe

if TYPE_CHECKING:
    from adapruner.run.preview import Preview


def prune(
    model: Model | None = None,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], group=MOST_USED)] = None,
    recipe: Annotated[str | None, Parameter(group=MOST_USED)] = None,
    from_: Annotated[Path | None, Parameter(name="--from", group=MOST_USED)] = None,
    dry_run: Annotated[Flag, Parameter(group=MOST_USED)] = False,
    options: Annotated[PruneOptions | None, Parameter(name="*")] = None,
    limit: Annotated[SizeLimit | None, Parameter(name="*")] = None,
    overwrite: Annotated[Flag, Parameter(group=RUN_FOLDER)] = False,
    json: Annotated[Json, Parameter(group=RUN_FOLDER)] = False,
) -> None:
    """Search, prune, heal, save and evaluate. Rerun the same command to resume.

    Not listed below: what only a search reads, as --objective, --pool, --samples and --terms.

    ```console
    adapruner prune Qwen/Qwen3-0.6B -o runs/a --dry-run
    adapruner prune Qwen/Qwen3-0.6B --ratio 0.2 --for llama.cpp -o runs/a
    adapruner prune Qwen/Qwen3-8B --size 12GB --heal 1M --calibration mix,notes.txt:0.5
    adapruner prune --from runs/a --ratio 0.3 -o runs/b
    ```

    Args:
        output: Run folder; the pruned model is saved in model/. By default runs/MODEL-RATIO.
        recipe: Options to start from: a recipe that adapruner recipes lists, or a YAML file. Options of the command
            line override them; the model may be that of the recipe.
        from_: Folder of an earlier run, to prune with another ratio, layout or effort. Its options are those to start
            from, and its measurements are taken over; its search too if only the ratio differs.
        dry_run: Check the options and print the artifacts of the run, with sizes and memory; write nothing.
        overwrite: Rebuild artifacts of other options, another model or other text.
    """
    chosen = given(options) | given(limit)
    if output is None:
        if from_:
            raise AdaPrunerError("name the folder of the new run: `output`")
        output = _default_output(model, recipe, chosen)
        print_note(f"run folder: {output}")
    with starting():
        from adapruner.run import api, engines, preview
    if dry_run:
        previewed = preview.preview(model, output=output, overwrite=overwrite, recipe=recipe, from_=from_, **chosen)
        print_output(previewed, json, _lines_of_preview(previewed))
        return
    result = api.prune(model, output=output, overwrite=overwrite, recipe=recipe, from_=from_, **chosen)
    print_advice(result.advice())
    serving = engines.serving_commands(result.result.config.for_, result.model_folder)
    files = f"model: {result.model_folder}   plan {result.plan.hash[:12]}   report {result.report}"
    print_output(result.result, json, [*result.tables(), files, *(f"serve: {line}" for line in serving)])


def _lines_of_preview(preview: Preview) -> Iterator[str]:
    """The artifacts that a run would make, with sizes and memory."""
    from adapruner.cli import with_options

    before, after = preview.parameters_before, preview.parameters_after
    yield f"about {after:,} of {before:,} parameters kept ({1 - after / before:.1%} removed)"
    yield f"to make: {', '.join(preview.missing) or 'nothing'}"
    yield f"on disk: model {preview.model_bytes / 1e6:,.1f} MB, moments {preview.moments_bytes / 1e6:,.1f} MB"
    if preview.memory:
        yield with_options(memory_line(preview.memory, preview.device))
        yield where(preview.device, preview.layer_wise)


def _default_output(model: str | None, recipe: str | None, options: dict[str, Any]) -> Path:
    """`runs/MODEL-RATIO`, or with a size in place of the ratio; MODEL is the last part of the name of the model."""
    chosen = override(read_recipe(recipe) if recipe else {}, options)
    if not (model := model or chosen.get("model")):
        raise AdaPrunerError("name a model: Hub id, model folder, .gguf file, or smollm2")
    name = Path(str(model)).resolve().name.removesuffix(".gguf")
    limits = config.SizeLimit.from_options(**{key: chosen[key] for key in chosen if key in ("size", "memory")})
    ratio = config.PruneOptions.from_options(**{key: chosen[key] for key in chosen if key == "ratio"}).ratio
    return Path("runs", f"{name}-{limits.size or limits.memory or format(ratio, 'g')}")


def report(run: Path, /, *, open: Flag = False, json: Json = False) -> None:
    """Write the report of a finished run, a self-contained page: report.html in the run folder.

    ```console
    adapruner report runs/a
    adapruner report runs/a --open
    ```

    Args:
        run: Folder of a finished run.
        open: Open the page in the browser.
    """
    import webbrowser

    with starting():
        from adapruner.graph.folder import RunFolder
        from adapruner.paths import given_path
        from adapruner.report._page import write_report
        from adapruner.run.options import register_extensions

    folder = RunFolder(given_path(run))
    register_extensions(folder.read_config())
    page = write_report(folder)
    if open:
        webbrowser.open(page.absolute().as_uri())
    print_output({"run": run, "report": page}, json, [f"report: {page}"])
