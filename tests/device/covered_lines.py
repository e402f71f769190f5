"""Which lines of the code that handles tensors run in the tests on the simulated device:

    python tests/device/covered_lines.py [arguments of pytest]

Runs `pytest -m ''`, by default on all of `tests/device`, and prints for each file how many of the lines of its
functions ran in the processes with simulated devices. Where a test repeats a command on the CPU for comparison, that
counts too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

PACKAGE = Path(__file__).parents[2] / "src" / "adapruner"
FOLDERS = ("evaluation", "importance", "measurement", "recovery", "search", "surgery")
FILES = ("models/_device.py", "models/_layers.py", "models/_loading.py")
# Where the processes with simulated devices write what they ran.
RECORDED = "ADAPRUNER_TEST_LINES"


def record() -> None:
    """Where the tests are run by this file, appends every line of the package that runs in this process to a file when
    it runs first: what kills the process loses nothing."""
    folder = os.environ.get(RECORDED)
    if not folder:
        return
    written = os.open(Path(folder, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    missing: dict[CodeType, set[int]] = {}

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)):
            return None
        if code not in missing:
            missing[code] = {line for _, _, line in code.co_lines() if line}
        return step if missing[code] else None

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_lineno in missing[frame.f_code]:
            missing[frame.f_code].discard(frame.f_lineno)
            os.write(written, f"{frame.f_code.co_filename}:{frame.f_lineno}\n".encode())
        return step

    def traced(register: Callable[..., Any]) -> Callable[..., Any]:
        """On a GPU, hooks of tensors run in threads that Python has not started."""

        def register_traced(tensor: torch.Tensor, hook: Callable[..., Any]) -> Any:
            def run(*given: Any) -> Any:
                sys.settrace(enter)
                return hook(*given)

            return register(tensor, run)

        return register_traced

    tensor: Any = torch.Tensor
    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        setattr(tensor, name, traced(getattr(tensor, name)))
    threading.settrace(enter)
    sys.settrace(enter)


def lines_of_functions(code: CodeType) -> Iterator[int]:
    """The lines that a file runs when its functions are called, not when it is imported."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from lines_of_functions(inner)
    # Code of a module or a class has names where that of a function has slots.
    if code.co_flags & 1:
        yield from (line for _, _, line in code.co_lines() if line and line != code.co_firstlineno)


def main() -> int:
    files = [file for folder in FOLDERS for file in sorted((PACKAGE / folder).glob("*.py"))]
    files += [PACKAGE / file for file in FILES]
    with tempfile.TemporaryDirectory() as recorded:
        tests = sys.argv[1:] or [str(Path(__file__).parent)]
        command = [sys.executable, "-m", "pytest", "-m", "", *tests]
        code = subprocess.run(command, env=os.environ | {RECORDED: recorded}, check=False).returncode
        ran = {line for file in Path(recorded).iterdir() for line in file.read_text(encoding="utf-8").splitlines()}
    all_covered = all_lines = 0
    for file in files:
        lines = set(lines_of_functions(compile(file.read_text(encoding="utf-8"), str(file), "exec")))
        covered = {line for line in lines if f"{file}:{line}" in ran}
        if lines:
            missing = " ".join(map(str, sorted(lines - covered)))
            print(f"{len(covered):5} of {len(lines):4} {file.relative_to(PACKAGE)}   not: {missing or 'none'}")
        all_covered, all_lines = all_covered + len(covered), all_lines + len(lines)
    print(f"{all_covered} of {all_lines} lines: {all_covered / all_lines:.1%}")
    return code


if __name__ == "__main__":
    sys.exit(main())
