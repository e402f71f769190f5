"""The command line: one file per verb, each parses, calls and prints.

Exit codes: 0 done, 1 an unexpected failure, 2 a mistake of the user's or a machine that gives out (disk, memory,
permissions), 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError

from adapruner.cli._output import plain_console
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
from adapruner.errors import AdaPrunerError, describe_failure, reason
from adapruner.interrupts import end_by_interrupt
from adapruner.progress import set_quiet

UNEXPECTED_FAILURE = 1
USER_ERROR = 2

# Messages quote what files and options hold; more of it than this is of no use to anybody.
_LONGEST_MESSAGE = 1000

app = App(name="adapruner", help="Makes causal language models really smaller.", suppress_keyboard_interrupt=False)

for verb in (prune, join, report, plan, recover, evaluate, benchmark, export, inspect):
    app.command(verb)
app.register_install_completion_command()
app.meta.suppress_keyboard_interrupt = False


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
    set_quiet(quiet)
    app(arguments, exit_on_error=False, print_error=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; without arguments, those of the process.

    A user's mistake, and a machine that gives out, is one line on stderr and exit code 2; Ctrl-C ends with 130 and
    SIGTERM with 143, as in a shell. Whatever else goes wrong is two lines and exit code 1: what happened, and the file
    that holds the traceback.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end_by_interrupt)
    try:
        app.meta(arguments, exit_on_error=False, print_error=False)
    except (AdaPrunerError, CycloptsError) as error:
        cause = error.__cause__
        _say(describe(cause) if isinstance(cause, ValidationError) else str(error))
        sys.exit(USER_ERROR)
    except KeyboardInterrupt as interrupt:
        _say("stopped; runs go on by the same command, without --overwrite")
        sys.exit(128 + next(iter(interrupt.args), signal.SIGINT))
    except Exception as error:
        if failure := describe_failure(error, "a narrower --dtype and smaller batches take less, where there are any"):
            _say(failure)
            sys.exit(USER_ERROR)
        _say(f"unexpected failure: {reason(error)}")
        with tempfile.NamedTemporaryFile("w", prefix="adapruner-", suffix=".log", delete=False) as file:
            file.write(traceback.format_exc())
        _say(f"the traceback is in {file.name}")
        sys.exit(UNEXPECTED_FAILURE)


def _say(message: str) -> None:
    """Prints one line on stderr, without what would move the cursor of a terminal or colour it."""
    line = " ".join(message.split())
    if len(line) > _LONGEST_MESSAGE:
        line = f"{line[:_LONGEST_MESSAGE]} …"
    shown = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)
    plain_console(stderr=True).print("adapruner:", shown, style="red", soft_wrap=True)
