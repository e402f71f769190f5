"""What `adapruner inspect --cost` says against what a run takes, for models of three sizes with random weights.

    python benchmarks/cost.py --calibration boolq-passages

For each size a folder is written, its memory is estimated, and it is pruned; compared is the peak of every stage
beyond what the process holds before the model is loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from cyclopts import run
from transformers import LlamaConfig, LlamaForCausalLM

from machine import MIB, describe
from seven_billion import write_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15},
    "0.5B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 28, "num_attention_heads": 16},
}
OPTIONS = {"pool": 16, "trials": 4, "objective-windows": 16, "final-windows": 0, "compensation-windows": 64}


def main(*, calibration: str, sizes: tuple[str, ...] = tuple(SIZES), dtype: str = "float32") -> None:
    """Prints every stage of every size, estimated and measured."""
    print(describe())
    flags = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))] + ["--dtype", dtype]
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
            model = Path(place) / "model"
            torch.manual_seed(0)
            config = LlamaConfig(vocab_size=8192, num_key_value_heads=SIZES[size]["num_attention_heads"], **SIZES[size])
            LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(model)
            write_tokenizer(model, calibration, config.vocab_size)
            estimated = adapruner("inspect", str(model), "--cost", *flags)
            command = ("prune", str(model), "--output", f"{place}/run", "--calibration", calibration, *flags)
            measured = adapruner(*command)["stages"]
            program = program_mib(Path(place, "run", "log.jsonl"))
        for stage in estimated["stages"]:
            own = measured[stage["stage"]]
            if stage["stage"] == "loading":  # files are mapped: what is read comes into memory in the next stages
                continue
            held, expected = own["peak_memory_mib"] - program, stage["device_bytes"] / MIB
            difference = f"{expected / held - 1:+.0%}"
            print(f"{size}, {stage['stage']}: {expected:.0f} MiB estimated, {held:.0f} held ({difference})", flush=True)


def adapruner(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "adapruner", *arguments, "--json"]
    printed: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return printed


def program_mib(log: Path) -> int:
    """What the process held when the first stage began."""
    return next(int(json.loads(line)["memory_mib"]) for line in log.read_text().splitlines() if '"started"' in line)


if __name__ == "__main__":
    run(main)
