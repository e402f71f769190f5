"""The command line: one file per verb, each parses, calls and prints."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
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
from adapruner.interrupts import end_by_interrupt
from adapruner.progress import QUIET

USER_ERROR = 2

app = App(name="adapruner", help="Makes causal language models really smaller.", suppress_keyboard_interrupt=False)
for verb in (prune, join, report, plan, recover, evaluate, benchmark, export, inspect):
    app.command(verb)
app.register_install_completion_command()


@app.meta.default
def launch(
    *arguments: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    quiet: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Options that all verbs share.

    Parameters
    ----------
    quiet:
        Say nothing but results, errors and advice.
    """
    if quiet:
        os.environ[QUIET] = "1"
    app(arguments, exit_on_error=False, print_error=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; without arguments, those of the process.

    A user's mistake is one line on stderr and exit code 2; Ctrl-C ends with 130 and SIGTERM with 143, as in a shell.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end_by_interrupt)
    try:
        app.meta(arguments, exit_on_error=False, print_error=False)
    except (AdaPrunerError, CycloptsError) as error:
        cause = error.__cause__
        message = describe(cause) if isinstance(cause, ValidationError) else str(error)
        Console(stderr=True).print("adapruner:", message, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt as interrupt:
        print("\nadapruner: stopped; runs go on by the same command", file=sys.stderr)
        sys.exit(128 + next(iter(interrupt.args), signal.SIGINT))
