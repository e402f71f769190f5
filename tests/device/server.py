"""Runs commands of AdaPruner on the simulated device: a JSON object on a line of stdin is a request, one on a line of
stdout its outcome (see `client.py`). All commands run in this process, so PyTorch is imported once for many tests.
"""

import contextlib
import gc
import json
import os
import re
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import simulated_cuda

native = simulated_cuda.install()

import torch  # noqa: E402

from adapruner.base.progress import Reporter  # noqa: E402
from adapruner.cli import main  # noqa: E402

KILLED = 9


class Stages:
    """Watches the stages of a command.

    Attributes:
        request: see `client.Device.run`.
        finished: of every stage, in order: name, steps, bytes held before it, peak and bytes held after it.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self.request, self.finished = request, list[tuple[str, int, int, int, int]]()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        own = Reporter.stage

        @contextlib.contextmanager
        def stage(reporter: Reporter, name: str, total: int = 1) -> Iterator[Callable[..., None]]:
            outer, simulated_cuda.stage = simulated_cuda.stage, name
            held = native.used(0)
            native.reset_peak(0)
            # The limit holds from the beginning of the stage: its check of free memory is passed.
            if name in self.request["limits"]:
                simulated_cuda.limit_memory(held + self.request["limits"][name])
            try:
                with own(reporter, name, total) as advance:
                    yield self._counting(name, advance)
            finally:
                self.finished.append((name, total, held, native.peak(0), native.used(0)))
                simulated_cuda.stage = outer

        Reporter.stage = stage  # type: ignore[method-assign]
        try:
            yield
        finally:
            Reporter.stage = own  # type: ignore[method-assign]

    def _counting(self, name: str, advance: Callable[..., None]) -> Callable[..., None]:
        of_stage, after = self.request["killed_in"] or ("", 0)
        done = 0

        def count(steps: int = 1, **named: Any) -> None:
            nonlocal done
            advance(steps, **named)
            done += steps
            if name == of_stage and done >= after:
                os._exit(KILLED)

        return count


@contextlib.contextmanager
def captured(folder: Path) -> Iterator[None]:
    """Whatever is written to stdout and stderr, also by other libraries and languages, goes to files."""
    kept = [os.dup(number) for number in (1, 2)]
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, own in zip((1, 2), kept, strict=True):
            os.dup2(own, number)
            os.close(own)


def outcome(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs a command, or a Python file, and tells what came of it."""
    simulated_cuda.limit_memory(request["memory"])
    simulated_cuda.native_bfloat16 = request["native_bfloat16"]
    # So that trials on the CPU have the same dtype.
    torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: request["native_bfloat16"]
    simulated_cuda.events.clear()
    stages, code = Stages(request), 0
    own_environment = dict(os.environ)
    os.environ.update(request["environment"])
    gc.collect()
    before, started = native.used(0), time.monotonic()
    with captured(folder), stages.watched():
        try:
            if request["file"]:
                runpy.run_path(request["file"], run_name="__main__")
            else:
                main(request["arguments"])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
    seconds = time.monotonic() - started
    os.environ.clear()
    os.environ.update(own_environment)
    simulated_cuda.limit_memory(80 * 2**30)
    gc.collect()
    said = (folder / "stderr").read_text(encoding="utf-8")
    if saved := re.search(r"the traceback is in (\S+)", said):
        said += Path(saved[1]).read_text(encoding="utf-8")
    return {
        "code": code,
        "stdout": (folder / "stdout").read_text(encoding="utf-8"),
        "stderr": said,
        "stages": stages.finished,
        "events": [[*what, calls] for what, calls in simulated_cuda.events.items()],
        "left": native.used(0) - before,
        "seconds": seconds,
    }


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(outcome(json.loads(line), Path(sys.argv[1]))), file=answers, flush=True)
