"""A 7B model on a small machine: LLaMA-7B's shapes with random weights, pruned by 20 % layer by layer.

    python benchmarks/seven_billion.py --folder runs/7b --calibration boolq-passages

Writes the model once (13.5 GB, sharded, bfloat16), runs `adapruner prune` on it and prints what each stage took, the
most memory that the process held, and what is left; at last loads the saved folder and predicts a token. Weights are
random, so nothing is said about quality here. Needs 45 GB of disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from cyclopts import run
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from adapruner.calibration import parse_source, read_documents
from adapruner.models import empty_model, find_model, load_model

LAYERS_PER_SHARD = 4


def main(*, folder: Path, calibration: str, layer_wise: bool = True, layers: int = 32) -> None:
    """Writes, prunes, loads; rerun to resume."""
    model, output = folder / "dense", folder / "run"
    if not (model / "config.json").is_file():
        write_model(model, calibration, layers)
    command = [sys.executable, "-m", "adapruner", "prune", str(model), "--output", str(output), "--json"]
    options = {
        "ratio": 0.25,
        "ratio-of": "groups",
        "protect-first": 4,
        "protect-last": 2,
        "head-share": 1.0,
        "round-to": 1,
        "space": "paper",
        "calibration": calibration,
        "pool": 4,
        "samples": 2,
        "objective-windows": 4,
        "final-windows": 0,
        "compensation-windows": 16,
        "trials": 2,
        "self-windows": 0,
    }
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command += ["--no-sequential", "--no-tune-scales", "--layer-wise" if layer_wise else "--no-layer-wise"]
    started = time.perf_counter()
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(finished.stdout)
    for stage, cost in result["stages"].items():
        print(f"{stage}: {cost['seconds']:.0f} s, at most {cost['peak_memory_mib'] / 1024:.1f} GiB")
    before, *_, after = (of_run["parameters"] for of_run in result["models"])
    print(f"all: {time.perf_counter() - started:.0f} s; {before:,} parameters, {after:,} kept")
    saved = load_model(find_model(str(output / "model")), layer_wise=True)
    with torch.no_grad():
        print("the saved folder predicts token", int(saved(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax()))


def write_model(folder: Path, text: str, layers: int) -> None:
    """A folder as `save_pretrained` would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    shapes = {name: tensor.shape for name, tensor in empty_model(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        number = int(parts[2]) // LAYERS_PER_SHARD + 1 if parts[1] == "layers" else 0
        shards.setdefault(f"model-{number:05}.safetensors", []).append(name)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            is_norm = len(shapes[name]) == 1
            values = torch.empty(shapes[name])
            tensors[name] = (values.fill_(1) if is_norm else values.normal_(0, 0.02, generator=generator)).bfloat16()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 2 * sum(map(torch.Size.numel, shapes.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder, text, config.vocab_size)
    config.save_pretrained(folder)


def write_tokenizer(folder: Path, text: str, size: int) -> None:
    """The most frequent words of a text."""
    words = Counter(word for document in read_documents(parse_source(text)) for word in document.split())
    vocabulary = ["<unk>", "<s>", "</s>", *(word for word, _ in words.most_common(size - 3))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


if __name__ == "__main__":
    run(main)
