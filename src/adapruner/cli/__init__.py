"""The command line: one file per verb, each parses, calls and prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError
from pydantic import ValidationError
from rich.console import Console

from adapruner.cli.benchmark import benchmark
from adapruner.cli.evaluate import evaluate
from adapruner.cli.export import export
from adapruner.cli.inspect import inspect
from adapruner.cli.join import join
from adapruner.cli.plan import plan
from adapruner.cli.prune import prune
from adapruner.cli.recover import recover
from adapruner.cli.report import report
from adapruner.config import describe
from adapruner.errors import AdaPrunerError

USER_ERROR = 2

app = App(name="adapruner", help="Makes causal language models really smaller.")
for verb in (prune, join, report, plan, recover, evaluate, benchmark, export, inspect):
    app.command(verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; without arguments, those of the process. A user's mistake is one line on stderr and exit code 2."""
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except (AdaPrunerError, CycloptsError) as error:
        cause = error.__cause__
        message = describe(cause) if isinstance(cause, ValidationError) else str(error)
        Console(stderr=True).print("adapruner:", message, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(USER_ERROR)
