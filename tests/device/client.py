"""The simulated device, as tests use it: commands run in another process, and what came of them is returned."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import constants

from run_helpers import RUN_OPTIONS, flags

HERE = Path(__file__).parent
GIB = 2**30
# Seconds of a command in several processes, which hang where one waits for another.
LONGEST = 280


@dataclass(frozen=True)
class Stage:
    """A stage of a command: its steps, and the bytes on the first device before, at most and after."""

    name: str
    steps: int
    held: int
    peak: int
    after: int


@dataclass(frozen=True)
class Outcome:
    """What came of a command.

    Attributes:
        code: the exit code; 9 if it was killed.
        stderr: with the traceback of an unexpected failure at the end.
        events: calls by (stage, kind, operator, line of the package); see `simulated_cuda.events`.
        left: bytes on the device that were not freed.
    """

    code: int
    stdout: str = ""
    stderr: str = ""
    stages: tuple[Stage, ...] = ()
    events: Mapping[tuple[str, str, str, str], int] = field(default_factory=dict)
    left: int = 0
    seconds: float = 0

    def count(self, stage: str, *kinds: str) -> int:
        """How many events of these kinds there were in a stage; copies that do not block are no event."""
        return sum(
            calls
            for (of, kind, operator, _), calls in self.events.items()
            if of == stage and kind in kinds and "non-blocking" not in operator
        )


class Device:
    """A process with the simulated device, started when it is first used and again after it was killed.

    Args:
        folder: for its output.
    """

    def __init__(self, folder: Path, devices: int = 1) -> None:
        self._folder, self._devices = folder, devices
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        *arguments: object,
        memory: int = 80 * GIB,
        limits: Mapping[str, int] | None = None,
        native_bfloat16: bool = True,
        killed_in: tuple[str, int] | None = None,
        file: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Runs `adapruner` with these arguments.

        Args:
            memory: bytes of each device.
            limits: of a stage, how many bytes beyond those held at its beginning there are from then on.
            native_bfloat16: whether the hardware multiplies bfloat16.
            killed_in: a stage, and the step after which the process dies there.
            file: a Python file to run in place of the command line.
            environment: variables that are added.
        """
        request = {
            "arguments": [str(argument) for argument in arguments],
            "memory": memory,
            "limits": dict(limits or {}),
            "native_bfloat16": native_bfloat16,
            "killed_in": killed_in,
            "file": None if file is None else str(file),
            "environment": dict(environment or {}),
        }
        process = self._started()
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            self.close()
            return Outcome(process.returncode, stderr=(self._folder / "stderr").read_text(encoding="utf-8"))
        answer: dict[str, Any] = json.loads(line)
        answer["stages"] = tuple(Stage(*stage) for stage in answer["stages"])
        answer["events"] = {tuple(what): calls for *what, calls in answer["events"]}
        return Outcome(**answer)

    def launch(
        self,
        *arguments: object,
        processes: int = 2,
        environment: Mapping[str, str] | None = None,
        killed_when: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Runs `adapruner` in several processes, as torchrun starts them, each with a GPU of its own: memory of the
        others cannot be allocated.

        Args:
            environment: variables that are added.
            killed_when: asked again and again; once it says yes, the launcher and all processes die.
        """
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        with (self._folder / "launched.out").open("w+") as stdout, (self._folder / "launched.err").open("w+") as stderr:
            started = psutil.Popen(
                [sys.executable, *launcher, str(HERE / "rank.py"), *map(str, arguments)],
                env=self.environment() | dict(environment or {}),
                stdout=stdout,
                stderr=stderr,
            )
            deadline = time.monotonic() + LONGEST
            while started.poll() is None:
                if killed_when() or time.monotonic() > deadline:
                    # The launcher first, so that it starts nothing else; its processes are not of its group.
                    for one in (started, *started.children(recursive=True)):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            one.kill()
                time.sleep(0.01)
            said = [Path(stream.name).read_text(encoding="utf-8") for stream in (stdout, stderr)]
        return Outcome(started.returncode, *said)

    def environment(self) -> dict[str, str]:
        """Of processes with simulated devices."""
        return os.environ | {
            "HF_HOME": constants.HF_HOME,  # families are checked once for all tests
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
            "SIMULATED_CUDA_DEVICES": str(self._devices),
            "COLUMNS": "200",
        }

    def close(self) -> None:
        """Ends the process."""
        if self._process:
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "server.py"), str(self._folder)],
                env=self.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._process


# Commands that take seconds.
SMALL_RUN = RUN_OPTIONS | {
    "trials": 6,
    "compensation_windows": 16,
    "limit": 6,
    # Three steps: training on a device is tested here.
    "heal": "3k",
}
LAYER_WISE = {"layer_wise": True}
SMALL_RECOVERY = {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "seq_len": 16, "warmup_steps": 0, "records": 40}


def pruning(model: Path, text: Path, output: Path, options: Mapping[str, object] = SMALL_RUN) -> list[object]:
    """The command that prunes a model."""
    return ["prune", model, "-o", output, "--calibration", text, *flags(options), "--json"]


def recovering(model: Path, data: object, output: Path, **options: object) -> list[object]:
    """The command that fine-tunes a model."""
    return ["recover", model, "--data", data, "-o", output, *flags(SMALL_RECOVERY | options), "--json"]


def only_json(outcome: Outcome) -> Any:
    """The result of a command that succeeded, of which there is nothing else on stdout."""
    assert outcome.code == 0, outcome.stderr
    return json.loads(outcome.stdout)


def only_line(outcome: Outcome) -> str:
    """The message of a command that was refused: one line, without a traceback, beside finished stages and advice."""
    assert outcome.code == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("adapruner: ")]
    assert len(lines) == 1, outcome.stderr
    return lines[0].removeprefix("adapruner: ")
