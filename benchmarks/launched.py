"""Kills one of two processes, or the launcher that started them: nothing is left running, and the rerun is right.

    OMP_NUM_THREADS=1 python benchmarks/launched.py --kills 10

`recover` trains a tiny model as `torchrun --nproc-per-node 2` starts it, with the agent of PyTorch and gloo. At a
moment drawn evenly from the time that an undisturbed command takes, the first process, the second one or the agent is
killed by SIGKILL. Thirty seconds later, none of them may be left. The same command is then run again, to its
end: the weights and the numbers must be those of an undisturbed one. Processes are forked from this one, which has
loaded the libraries. Linux only.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
from cyclopts import run as run_benchmark
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import adapruner.cli
from machine import describe
from random_use import call, numbers, prune_command, quickly, recover_command, shared

LONGEST_END = 30
VICTIMS = ("first process", "second process", "agent")


def work(arguments: list[str], said: str) -> None:
    """In each of the processes."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    try:
        adapruner.cli.main(arguments)
    except SystemExit as ended:
        # PyTorch waits for a value where a process ends well.
        if ended.code:
            sys.exit(int(str(ended.code)))


def start(arguments: list[str], said: Path) -> int:
    """The number of the agent, which starts two processes that run the command line."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        out = os.open(said.with_suffix(".agent"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        config = LaunchConfig(
            1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0
        )
        elastic_launch(config, work)(arguments, str(said))
        code = 0
    finally:
        os._exit(code)


def finish(arguments: list[str], said: Path) -> float:
    """Seconds that a command takes to its end; what had finished is replaced.

    Raises:
        AssertionError: it failed.
    """
    started = time.monotonic()
    _, status = os.waitpid(start(arguments, said), 0)
    if status and "exists: choose another output" in said.read_text().splitlines()[-1]:
        _, status = os.waitpid(start([*arguments, "--overwrite"], said), 0)
    assert status == 0, said.read_text() + said.with_suffix(".agent").read_text()
    return time.monotonic() - started


def kill(arguments: list[str], said: Path, victim: str, moment: float) -> bool:
    """Kills one process of a command; False if the command had ended before.

    Raises:
        AssertionError: some process is left, or one printed a traceback.
    """
    agent = psutil.Process(start(arguments, said))
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline or len(agent.children()) < 2:
        if agent.status() == psutil.STATUS_ZOMBIE:
            os.waitpid(agent.pid, 0)
            return False
        time.sleep(0.02)
    family = [agent, *agent.children(recursive=True)]
    chosen = agent if victim == "agent" else family[1 + VICTIMS.index(victim)]
    chosen.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + LONGEST_END
    while left := [it for it in family if it.is_running() and it.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
            raise AssertionError(f"{len(left)} processes are running after {LONGEST_END} s")
        time.sleep(0.1)
    os.waitpid(agent.pid, 0)
    text = said.read_text() if said.exists() else ""
    assert "Traceback" not in text, text
    assert "unexpected failure" not in text, text
    return True


def main(*, kills: int = 10, seed: int = 0) -> None:
    """Prints what was killed when; ends with code 1 if something was left or a result was another."""
    print(describe(), flush=True)
    generator, wrong, killed = random.Random(seed), 0, 0
    with quickly():
        folder = shared()
        run, undisturbed = folder / "run", folder / "tuned"
        assert call(prune_command("a tenth", run)).code == 0
        seconds = finish(recover_command(run, undisturbed), folder / "said.txt")
        print(f"undisturbed: {seconds:.1f} s", flush=True)
        for number in range(kills):
            victim, moment = VICTIMS[number % 3], generator.uniform(0, 0.9 * seconds)
            place = Path(tempfile.mkdtemp(dir=folder))
            arguments, said = recover_command(run, place / "output"), place / "said.txt"
            title = f"{victim} killed after {moment:.1f} s"
            try:
                was_killed = kill(arguments, said, victim, moment)
                killed += was_killed
                finish(arguments, said)
                left = {path.name for path in place.iterdir()} - {"output", "said.txt", "said.agent"}
                assert not left, left
                assert numbers(place / "output") == numbers(undisturbed)
                print(f"{title}: {'resumed' if was_killed else 'had finished'}", flush=True)
            except AssertionError as error:
                wrong += 1
                print(f"{title}: {str(error)[:3000]}", flush=True)
            shutil.rmtree(place)
    print(f"{kills} commands, {killed} killed before they ended well, {wrong} wrong")
    shutil.rmtree(folder)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    run_benchmark(main)
