"""adapruner report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from adapruner.cli._output import plain_console, print_json


def report(
    run: Path,
    /,
    *,
    open: Annotated[bool, Parameter(negative="")] = False,
    watch: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write the report of a run, a self-contained page: report.html in the run folder.

    Parameters
    ----------
    run:
        Run folder; the report of an unfinished run shows what is available.
    open:
        Open the page in the browser.
    watch:
        Update the page every few seconds while the run is in progress; the open page reloads automatically.
    json:
        Print the path of the page as JSON on stdout.
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
