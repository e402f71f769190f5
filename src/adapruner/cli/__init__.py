"""The command line: each verb parses, calls and prints.

A verb imports PyTorch and modules that need it when it is run: help and errors of the parser are immediate.

Exit codes: 0 success; 2 invalid input or insufficient resources (disk, memory, permissions); 130 interrupted by Ctrl-C,
143 by SIGTERM, 129 by SIGHUP; 141 stdout was closed (SIGPIPE); 1 unexpected failure.
"""

import functools
import io
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn, TextIO

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError

from adapruner import __version__
from adapruner.base.errors import (
    AdaPrunerError,
    describe_failure,
    describe_invalid,
    end_by_interrupt,
    handling_interrupts,
    reason,
    without_secrets,
)
from adapruner.cli.models import benchmark, evaluate, export, recover, vocabulary
from adapruner.cli.runs import env, inspect, prune, recipes, report
from adapruner.cli.shared import CLOSED_OUTPUT, HELP_ALL, SHOWS_ALL, Flag, plain_console

UNEXPECTED_FAILURE = 1
USER_ERROR = 2

# Messages quote files and options, which may be long.
_LONGEST_MESSAGE = 1000

app = App(
    name="adapruner",
    help="Prunes causal language models into smaller dense checkpoints.",
    help_epilogue=None if SHOWS_ALL else f"Some options of a command are shown by {HELP_ALL} alone.",
    version=__version__,
    console=plain_console(),
    suppress_keyboard_interrupt=False,
)

# In the order of use.
for verb in (inspect, prune, report, recover, evaluate, benchmark, export, vocabulary, recipes, env):
    app.command(verb)
for place, name in enumerate(name for name in app if not name.startswith("-")):
    app[name].sort_key = place
app.register_install_completion_command()
app.meta.suppress_keyboard_interrupt = False


@app.meta.default
def launch(
    *arguments: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    quiet: Flag = False,
    verbose: Annotated[bool, Parameter(name=["--verbose", "-v"], negative="")] = False,
) -> None:
    """Options that all verbs share.

    Args:
        quiet: Print only results, errors and advice.
        verbose: Log the memory and time of every stage, and the warnings of transformers and the Hub.
    """
    logger = logging.getLogger("adapruner")
    before = logger.level
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    if logger.level == logging.DEBUG:
        logging.basicConfig(format="%(name)s: %(message)s")
    try:
        app(arguments, exit_on_error=False, print_error=False)
    finally:
        logger.setLevel(before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; without arguments, those of the process.

    An error that the user can fix is one line on stderr; an unexpected failure is two, with the file that holds the
    traceback. See the module for the exit codes.
    """
    # In other encodings than UTF-8, results have characters that cannot be written.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with handling_interrupts(end_by_interrupt):
            words = sys.argv[1:] if arguments is None else arguments
            app.meta(["--help" if word == HELP_ALL else word for word in words], exit_on_error=False, print_error=False)
            sys.stdout.flush()
    except AdaPrunerError as error:
        _say(with_options(str(error)))
        sys.exit(USER_ERROR)
    except CycloptsError as error:
        cause = error.__cause__
        _say(with_options(describe_invalid(cause) if isinstance(cause, ValidationError) else str(error)))
        sys.exit(USER_ERROR)
    except KeyboardInterrupt as interrupt:
        _say("interrupted; rerun the same command to resume")
        sys.exit(128 + next(iter(interrupt.args), signal.SIGINT))
    except SystemExit:
        raise
    except BaseException as error:
        _fail(error)
    finally:
        _drop_if_closed(sys.stderr)


def _fail(error: BaseException) -> NoReturn:
    """Ends after an error that is not of this package."""
    if isinstance(error, OSError) and _drop_if_closed(sys.stdout) and isinstance(error, BrokenPipeError):
        sys.exit(CLOSED_OUTPUT)
    if failure := describe_failure(error, "a narrower --dtype or smaller batches need less, if the command has them"):
        _say(failure)
        sys.exit(USER_ERROR)
    _say(f"unexpected failure: {reason(error)}")
    with tempfile.NamedTemporaryFile(
        "w", prefix="adapruner-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(without_secrets("".join(traceback.format_exception(error))))
    _say(f"the traceback is in {file.name}")
    sys.exit(UNEXPECTED_FAILURE)


def _drop_if_closed(stream: TextIO) -> bool:
    """Drops the output that waits for a stream that nobody reads, or Python would end with another exit code; True if
    there is nobody."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def with_options(message: str) -> str:
    """Replaces every field in backticks, as the library names it, by its option; other text in backticks is kept."""

    def option(match: re.Match[str]) -> str:
        name = f"--{match[1].strip('_').replace('_', '-')}"
        return name if name in _known_options() else match[0]

    return re.sub("`([a-z][a-z0-9_.]*)`", option, message)


@functools.cache
def _known_options() -> frozenset[str]:
    """The options of all verbs; cyclopts needs a tenth of a second to list them."""
    return frozenset(
        name
        for command in app
        if not command.startswith("-")
        for argument in app[command].assemble_argument_collection()
        for name in argument.names
    )


def _say(message: str) -> None:
    """Prints one line on stderr, without secrets."""
    line = without_secrets(" ".join(message.split()))
    if len(line) > _LONGEST_MESSAGE:
        line = f"{line[:_LONGEST_MESSAGE]} …"
    plain_console(stderr=True).print("adapruner:", line, style="red", soft_wrap=True)
