"""Broken inputs are made here and handed to the command line as a user would; each is refused in short."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapruner.cli import main

SECONDS = 20

Command = Callable[..., list[str]]
Refused = Callable[..., str]
RunCli = Callable[[list[str]], tuple[int, str, str]]


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fails what takes longer."""

    def stop(*_: object) -> None:
        pytest.fail(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run_cli(capfd, monkeypatch):
    """Runs a command in this process: its exit code, and what it prints on stdout and stderr."""

    def run(arguments: list[str]) -> tuple[int, str, str]:
        code = 0
        # Libraries log to what stderr was when they were imported, which is not what is captured.
        for name in ("datasets", "transformers", "huggingface_hub"):
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:
                    monkeypatch.setattr(handler, "stream", sys.stderr)
        capfd.readouterr()
        with time_limit(SECONDS):
            try:
                main(arguments)
            except SystemExit as stop:
                code = int(stop.code or 0)
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def refused(run_cli):
    """Asserts that a command ends as a mistake of the user's, in one line that says all that it should; returns it."""

    def refuse(arguments: list[str], *expected: str) -> str:
        code, output, errors = run_cli(arguments)
        assert code == 2, errors
        assert output == ""
        *stages, message = errors.splitlines()
        assert all(": done in " in stage or stage.startswith("about ") for stage in stages), errors
        assert message.startswith("adapruner: ")
        assert message.isprintable()
        for words in expected:
            assert words in message
        return message

    return refuse


# Options of commands that work, of every verb that reads a model or a run.
OPTIONS: dict[str, str] = {
    "prune": "--pool 4 --samples 2 --trials 2 --objective-windows 4 --seq-len 16 --ratio 0.1 --round-to 1"
    " --protect-first 1 --protect-last 1 --compensation-windows 8 --heal none",
    "recover": "--seq-len 16 --steps 1",
    "evaluate": "--seq-len 16 --limit 2",
    "benchmark": "--prompt 4 --new-tokens 2 --repetitions 1 --batch-size 1",
    "export": "--to gguf",
    "inspect": "",
}
READS = {"prune": "--calibration", "recover": "--data", "evaluate": "--evaluate"}


@pytest.fixture
def command(tmp_path, model_folder, text_file):
    """A command of a verb that works, with further options, also in place of its own."""

    def of(
        verb: str,
        *options: str,
        model: str | Path = model_folder,
        text: str | Path = text_file,
        output: str | Path = tmp_path / "output",
    ) -> list[str]:
        words = OPTIONS[verb].split()
        own = dict(zip(words[::2], words[1::2], strict=True))
        if verb in READS:
            own[READS[verb]] = str(text)
        if verb in ("prune", "recover", "export"):
            own["-o"] = str(output)
        kept = [part for name, value in own.items() if name not in options for part in (name, value)]
        return [verb, str(model), *kept, *options]

    return of
