"""adapruner report"""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from adapruner import verbs
from adapruner.cli._output import plain_console, print_json


def report(
    run: Path,
    /,
    *,
    open: Annotated[bool, Parameter(negative="")] = False,
    watch: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write the report of a run, report.html in its folder: one page that needs nothing else.

    Parameters
    ----------
    run:
        Its folder; of a run that is not finished, the page shows what there is.
    open:
        Show the page in the browser.
    watch:
        Write it again every few seconds as long as a process is at the run; the page follows by itself.
    json:
        Print where it is as JSON on stdout.
    """
    written = verbs.write_reports(run, watch)
    page = next(written)
    if open:
        webbrowser.open(page.absolute().as_uri())
    if json:
        print_json({"run": str(run), "report": str(page)})
    else:
        plain_console().print(f"report: {page}", soft_wrap=True)
    for _ in written:
        pass
