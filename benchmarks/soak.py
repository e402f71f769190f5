"""Kills runs at random moments and resumes them, again and again: all must end as an undisturbed run does.

Makes "Soak" of docs/reliability.md. Takes about an hour for 100 runs on two cores.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --runs 100

Every run prunes a tiny model, fine-tunes it, evaluates it and writes its report. It is killed one to five times, by
SIGKILL, at moments drawn evenly from most of the time that an undisturbed run takes; then it is left alone. The keys of
all artifacts, what was measured, the trials, the plan, both models and all numbers are compared with those of an
undisturbed run with the same seed. Nothing unfinished may be left. Processes are forked from this one, which has loaded
the libraries once.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from cyclopts import run as run_benchmark
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import adapruner.cli
from machine import describe

VOCABULARY = 96
SEEDS = 5
# Of the time that an undisturbed run takes: some runs are faster than that one.
LATEST_KILL = 0.9
OPTIONS = {
    "ratio": 0.1,
    "pool": 12,
    "samples": 4,
    "objective-windows": 6,
    "seq-len": 16,
    "trials": 12,
    "round-to": 1,
    "protect-first": 1,
    "protect-last": 1,
    "heal": "6k",
}


def main(*, runs: int = 100, most_kills: int = 5, workers: int = 2, seed: int = 0) -> None:
    """Prints where runs were killed, and which did not end as they should; ends with code 1 if there are any.

    Args:
        workers: runs at once.
    """
    print(describe())
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as place, ProcessPoolExecutor(workers, mp_context=context) as pool:
        folder = Path(place)
        write_model(folder / "model")
        write_text(folder / "text.txt")
        references = list(pool.map(partial(run_undisturbed, folder), range(SEEDS)))
        disturbed = partial(run_disturbed, folder, references, most_kills, seed)
        outcomes = list(pool.map(disturbed, range(runs)))
    stages = Counter(stage for killed_in, _ in outcomes for stage in killed_in)
    wrong = [f"run {number}: {problem}" for number, (_, problem) in enumerate(outcomes) if problem]
    print(f"{sum(bool(killed_in) for killed_in, _ in outcomes)} of {runs} runs were killed before they had finished")
    print(f"killed {sum(stages.values())} times, after: {', '.join(f'{s} {n}' for s, n in stages.most_common())}")
    print(f"{runs - len(wrong)} of {runs} runs finished with the plan, weights and numbers of undisturbed ones")
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


def run_undisturbed(folder: Path, seed: int) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    assert not wait(start(folder, folder / f"undisturbed{seed}", seed)), (folder / f"undisturbed{seed}.txt").read_text()
    return time.monotonic() - started


def run_disturbed(
    folder: Path, seconds: list[float], most_kills: int, seed: int, number: int
) -> tuple[list[str], str | None]:
    """After which stages a run was killed, and what is wrong with its end."""
    own, of_model = random.Random(f"{seed}/{number}"), number % SEEDS
    output, killed_in = folder / f"run{number}", []
    moments = sorted(own.uniform(0, LATEST_KILL * seconds[of_model]) for _ in range(own.randint(1, most_kills)))
    for before, moment in itertools.pairwise([0.0, *moments]):
        child = start(folder, output, of_model)
        time.sleep(moment - before)
        os.kill(child, signal.SIGKILL)
        if wait(child) == signal.SIGKILL:
            killed_in.append(last_stage(output))
    if wait(start(folder, output, of_model)):
        return killed_in, (folder / f"{output.name}.txt").read_text()
    return killed_in, difference(output, folder / f"undisturbed{of_model}")


def wait(child: int) -> int:
    """The status with which a process has ended."""
    return os.waitpid(child, 0)[1]


def start(folder: Path, output: Path, seed: int) -> int:
    """The number of a process that runs the command line."""
    child = os.fork()
    if child:
        return child
    log = os.open(folder / f"{output.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = OPTIONS | dict.fromkeys(("calibration", "evaluate"), folder / "text.txt") | {"seed": seed}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    code: object = 1
    try:
        adapruner.cli.main(["prune", str(folder / "model"), "-o", str(output), *flags])
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        os._exit(int(code is not None and code != 0))


def last_stage(output: Path) -> str:
    """The last stage that was finished or begun."""
    log = output / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return json.loads(lines[-1])["stage"] if lines else "preparing"


def difference(run: Path, undisturbed: Path) -> str | None:
    """What is not the same in two finished runs."""
    results = [json.loads((each / "result.json").read_text()) for each in (run, undisturbed)]
    for result in results:
        del result["stages"]
        if result["healing"]["record"]:
            del result["healing"]["record"]["seconds"]
    for key in results[0]:
        if results[0][key] != results[1][key]:
            return f"{key} differs: {results[0][key]} in place of {results[1][key]}"
    files = [{path.relative_to(each).as_posix() for path in each.rglob("*")} for each in (run, undisturbed)]
    if files[0] != files[1]:
        return f"other files: {', '.join(sorted(files[0] ^ files[1]))}"
    for name in sorted(files[0]):
        if name.startswith("keys/"):
            records = [json.loads((each / name).read_text()) for each in (run, undisturbed)]
            if any(records[0][field] != records[1][field] for field in ("options", "leaves", "inputs")):
                return f"{name} differs: {records[0]} in place of {records[1]}"
        elif name.endswith(".safetensors"):
            tensors = [load_file(each / name) for each in (run, undisturbed)]
            if tensors[0].keys() != tensors[1].keys():
                return f"the tensors of {name} differ"
            different = [one for one, tensor in tensors[0].items() if not torch.equal(tensor, tensors[1][one])]
            if different:
                return f"{len(different)} tensors of {name} differ, {different[0]} first"
    return None


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(VOCABULARY - 4))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def write_text(path: Path) -> None:
    generator = random.Random(0)
    paragraphs = (generator.choices(range(VOCABULARY - 4), k=20) for _ in range(300))
    path.write_text("\n\n".join(" ".join(f"w{number}" for number in paragraph) for paragraph in paragraphs))


if __name__ == "__main__":
    run_benchmark(main)
