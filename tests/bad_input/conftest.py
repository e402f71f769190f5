"""Broken inputs are made here and handed to the command line as a user would; each is refused in short."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapruner.cli import main

SECONDS = 20

Refused = Callable[..., str]


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
def run_cli(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], tuple[int, str, str]]:
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
def refused(run_cli: Callable[[list[str]], tuple[int, str, str]]) -> Refused:
    """Asserts that a command ends as a mistake of the user's, in one line that says all that it should; returns it."""

    def refuse(arguments: list[str], *expected: str) -> str:
        code, output, errors = run_cli(arguments)
        assert code == 2, errors
        assert output == ""
        *stages, message = errors.splitlines()
        assert all(": done in " in stage for stage in stages), errors
        assert message.startswith("adapruner: ")
        assert message.isprintable()
        for words in expected:
            assert words in message
        return message

    return refuse


@pytest.fixture
def commands(tmp_path: Path, text_file: Path) -> Callable[[str | Path], dict[str, list[str]]]:
    """A command of every verb that takes a model."""

    def of(model: str | Path) -> dict[str, list[str]]:
        name, text = str(model), str(text_file)
        output = str(tmp_path / "output")
        return {
            "prune": [
                *("prune", name, "-o", output, "--calibration", text, "--pool", "4", "--samples", "2", "--trials", "2"),
                *("--objective-windows", "4", "--seq-len", "16", "--ratio", "0.1", "--round-to", "1"),
                *("--protect-first", "1", "--protect-last", "1", "--compensation-windows", "8", "--self-windows", "4"),
                *("--level-rounds", "0", "--final-windows", "4"),
            ],
            "recover": ["recover", name, "--data", text, "-o", output, "--seq-len", "16", "--steps", "1"],
            "evaluate": ["evaluate", name, "--evaluate", text, "--seq-len", "16", "--limit", "2"],
            "benchmark": [
                *("benchmark", name, "--prompt", "4", "--new-tokens", "2", "--repetitions", "1", "--batch-size", "1"),
            ],
            "export": ["export", name, "--to", "stock", "-o", output],
            "inspect": ["inspect", name],
        }

    return of
