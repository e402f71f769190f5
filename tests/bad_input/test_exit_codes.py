"""How a command ends that does not succeed, and what it leaves behind in its process."""

import ast
import errno
import gc
import importlib
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.base.progress import Reporter


class Panic(BaseException):
    """As libraries in Rust raise it."""


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("adapruner.run.steps.inspect", fail)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a"),
        RuntimeError("one\ntwo\nthree"),
        AssertionError(),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"),
        PermissionError(errno.EACCES, "Permission denied"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        Panic("no entry found for key"),
    ],
)
def test_an_unexpected_failure(error, run_cli, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fail_with(error, monkeypatch)
    code, output, errors = run_cli(["inspect", "x"])
    assert (code, output) == (1, "")
    first, second = errors.splitlines()
    assert first.startswith("adapruner: unexpected failure: ")
    path = re.fullmatch(r"adapruner: the traceback is in (.*)", second)
    assert path
    assert "Traceback" in Path(path[1]).read_text()


FIELDS = "`round_to`, `micro_batch_size`, `gguf_type` and `evaluate_bos`, not `config.json`, `model` or `a b`"
OPTIONS = "--round-to, --micro-batch-size, --gguf-type and --evaluate-bos, not `config.json`, `model` or `a b`"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; rerun the same command to resume\n"),
        (AdaPrunerError(FIELDS), 2, f"{OPTIONS}\n"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 2, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "no space left on the disk (a/b): free some"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "out of memory"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "permission denied (a/b)"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), 2, "read-only file system (a/b)"),
    ],
)
def test_what_is_said_in_one_line(error, code, said, run_cli, monkeypatch):
    fail_with(error, monkeypatch)
    ended, output, errors = run_cli(["inspect", "x"])
    assert (ended, output, errors.count("\n")) == (code, "", 1)
    assert errors.startswith(f"adapruner: {said}")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_disk_that_is_full_while_a_checkpoint_of_a_training_is_written(run_cli, monkeypatch):
    with pytest.raises(RuntimeError) as failed:
        torch.save({"exp_avg": torch.zeros(100_000)}, "/dev/full")
    fail_with(failed.value, monkeypatch)
    assert run_cli(["inspect", "x"]) == (2, "", "adapruner: no space left on the disk: free some\n")


def test_help_and_nothing_are_no_failures(run_cli):
    for arguments in ([], ["--help"], ["prune", "--help"]):
        code, output, errors = run_cli(arguments)
        assert (code, errors) == (0, "")
        assert "adapruner" in output


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["--help"], ""), (["--help"], "1"), (["inspect", "MODEL", "--json"], "1")],
    ids=["help", "help unbuffered", "inspect unbuffered"],
)
def test_a_reader_that_has_ended(arguments, unbuffered, model_folder):
    """As in `adapruner --help | true`."""
    command = [
        sys.executable,
        "-m",
        "adapruner",
        *(str(model_folder) if part == "MODEL" else part for part in arguments),
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


def test_errors_that_nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "adapruner", "prune", "--trials", "0", "-o", "x"]
    # As most users have it: what is printed waits in a buffer.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(command, stderr=writing, stdout=subprocess.PIPE, check=False, env=buffered)
    os.close(writing)
    assert (ended.returncode, ended.stdout) == (2, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_an_output_that_is_full():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "adapruner", "--help"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "adapruner: no space left on the disk: free some\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["prune", "--help"], ["prune", "--trails", "3"]])
def test_the_parser_needs_no_heavy_library(arguments):
    program = (
        "import sys, adapruner.cli\n"
        "try: adapruner.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*{'torch', 'transformers', 'datasets', 'optuna', 'numpy'} & sys.modules.keys(), file=sys.stderr)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert ended.stderr.splitlines()[-1] == ""
    assert ended.stdout or "Did you mean --trials?" in ended.stderr


def test_the_version(run_cli):
    assert run_cli(["--version"]) == (0, f"{adapruner.__version__}\n", "")


def test_nothing_is_left_behind(run_cli, monkeypatch):
    def state() -> tuple[object, ...]:
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        return dict(os.environ), *handlers, logging.getLogger("adapruner").level, gc.isenabled()

    quiet: list[bool] = []
    monkeypatch.setattr("adapruner.run.steps.inspect", lambda _: quiet.append(Reporter().console.quiet))
    before = state()
    for flags in (["--quiet"], []):
        run_cli([*flags, "inspect", "x"])
    assert state() == before
    assert quiet == [True, False]


def test_the_lazy_names_are_those_that_tools_see():
    tree = ast.parse(Path(adapruner.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    homes = {name.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert homes.keys() == {*adapruner.__all__}
    for name, home in homes.items():
        assert getattr(adapruner, name) is getattr(importlib.import_module(str(home)), name)
        assert name in dir(adapruner)
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        adapruner.prun  # noqa: B018 - looking it up is what fails
