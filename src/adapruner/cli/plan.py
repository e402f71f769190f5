"""adapruner plan"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from adapruner.cli._output import plain_console, print_advice, print_json, print_result


def plan(
    run: Path,
    /,
    *,
    ratio: float,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Prune to another ratio with the statistics and the best trial of a finished run.

    Parameters
    ----------
    run:
        Folder of the finished run.
    ratio:
        Fraction of all parameters to remove.
    output:
        Folder of the new run.
    overwrite:
        Rebuild what was made with other options, from another model or other text.
    json:
        Print result.json on stdout instead of the tables.
    """
    from adapruner import pipeline

    result = pipeline.plan_again(run, output, ratio, overwrite)
    print_advice(result.advice())
    if json:
        print_json(result.result.model_dump(mode="json"))
        return
    plain_console().print(result.plan.explain())
    print_result([result])
