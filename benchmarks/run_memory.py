"""The memory that a whole run takes: a Llama of half a billion parameters in float32 is pruned on the CPU, and the peak
of every stage is printed.

Makes "Peak memory of a run" of research/results.md. Takes about half an hour.

    python benchmarks/run_memory.py
    PYTHONPATH=/path/to/another/version/src python benchmarks/run_memory.py

The run is `adapruner prune` with its default stages and few windows, in a process of its own, which is also watched
from outside: memory held between stages counts too. Weights and text are random and the vocabulary is tiny (96 words),
so that the decoder layers are nearly all of the model. Nothing of the package is imported: any version can be measured.
Linux only.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cyclopts import run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from machine import MIB, describe

VOCABULARY = 96
# 487 million parameters, all but 0.1 million of them in decoder layers.
SHAPE: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 3456,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Few windows of few tokens: what is held beside weights is small.
OPTIONS = {
    "seq_len": 32,
    "pool": 8,
    "samples": 4,
    "objective_windows": 8,
    "compensation_windows": 16,
    "evaluate_windows": 8,
    "trials": 4,
    "device": "cpu",
}


def main(*, layers: int = 28) -> None:
    """Prints the peak of every stage, and the largest of all.

    Args:
        layers: fewer make a quick check of this script.
    """
    print(describe(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = make_model(folder / "model", layers)
        for name, seed in (("calibration", 1), ("report", 2)):
            write_text(folder / f"{name}.txt", seed)
        command = [sys.executable, "-m", "adapruner", "prune", str(folder / "model"), "-o", str(folder / "run")]
        command += ["--calibration", str(folder / "calibration.txt"), "--evaluate", str(folder / "report.txt")]
        for option, value in OPTIONS.items():
            command += [f"--{option.replace('_', '-')}", str(value)]
        with (folder / "output.txt").open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            samples = watch(process)
        if process.returncode:
            sys.exit((folder / "output.txt").read_text())
        stages = read_stages(folder / "run" / "log.jsonl")
    print(f"weights in float32: {weights / MIB:,.0f} MiB; the run took {samples[-1].time - samples[0].time:.0f} s")
    print(f"{'stage':<24}{'held before':>12}{'peak':>9}{'without files':>15}  MiB")
    for stage in stages:
        without_files = max((each.anonymous for each in samples if stage.began <= each.time <= stage.ended), default=0)
        print(f"{stage.name:<24}{stage.held:>12,}{stage.peak:>9,}{without_files // MIB:>15,}")
    peak = max(max(each.resident for each in samples) // MIB, *(stage.peak for stage in stages))
    print(f"{'in all':<24}{'':>12}{peak:>9,}{max(each.anonymous for each in samples) // MIB:>15,}")
    print(f"{peak * MIB / weights:.2f} times the weights")


def make_model(folder: Path, layers: int, **shape: int) -> int:
    """Writes a random model with its tokenizer; returns the bytes of its weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": layers} | shape))
    model.save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(VOCABULARY - 4))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return sum(weight.nbytes for weight in model.parameters())


def write_text(path: Path, seed: int) -> None:
    """200 paragraphs of 40 random words."""
    rows = torch.randint(VOCABULARY - 4, (200, 40), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text("\n\n".join(" ".join(f"w{number}" for number in row) for row in rows), encoding="utf-8")


@dataclass(frozen=True)
class Sample:
    """Bytes that a process holds at a time: of all memory, and of that without pages of files."""

    time: float
    resident: int
    anonymous: int


def watch(process: subprocess.Popen[bytes]) -> list[Sample]:
    """What a process holds until it ends, fifty times a second."""
    samples = []
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        held = [re.search(rf"{field}:\s+(\d+)", status) for field in ("VmRSS", "RssAnon")]
        samples.append(Sample(time.time(), *(1024 * int(found[1]) if found else 0 for found in held)))
        time.sleep(0.02)
    return samples


@dataclass(frozen=True)
class Stage:
    """A stage that has ended, with MiB held when it began, and its peak as the run has noted it."""

    name: str
    began: float
    ended: float
    held: int
    peak: int


def read_stages(log: Path) -> list[Stage]:
    """The stages of a run in the order of their ends; none is inside another one of its name."""
    begun: dict[str, dict[str, Any]] = {}
    stages = []
    for line in log.read_text(encoding="utf-8").splitlines():
        entry: dict[str, Any] = json.loads(line)
        if entry["event"] == "started":
            begun[entry["stage"]] = entry
        else:
            began = begun[entry["stage"]]
            times = began["time"], entry["time"]
            stages.append(Stage(entry["stage"], *times, began["memory_mib"], entry["peak_memory_mib"]))
    return stages


if __name__ == "__main__":
    run(main)
