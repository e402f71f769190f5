"""What is not the user's mistake: an interruption, and failures that nobody expects."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

import pytest

RunCli = Callable[[list[str]], tuple[int, str, str]]


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("adapruner.verbs.inspect", fail)


def test_an_interruption(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert run_cli(["inspect", "x"]) == (
        130,
        "",
        "adapruner: stopped; runs go on by the same command, without --overwrite\n",
    )


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("one\ntwo\nthree"), AssertionError()])
def test_an_unexpected_failure(
    error: Exception, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fail_with(error, monkeypatch)
    code, output, errors = run_cli(["inspect", "x"])
    assert (code, output) == (1, "")
    first, second = errors.splitlines()
    assert first.startswith("adapruner: unexpected failure: ")
    path = re.fullmatch(r"adapruner: the traceback is in (.*)", second)
    assert path
    assert "Traceback" in Path(path[1]).read_text()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "no space left on the disk (a/b): free some"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "permission denied (a/b)"),
    ],
)
def test_a_machine_that_gives_out(
    error: Exception, said: str, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(error, monkeypatch)
    code, output, errors = run_cli(["inspect", "x"])
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"adapruner: {said}")


def test_help_and_nothing_are_no_failures(run_cli: RunCli) -> None:
    for arguments in ([], ["--help"], ["prune", "--help"]):
        code, output, errors = run_cli(arguments)
        assert (code, errors) == (0, "")
        assert "adapruner" in output
