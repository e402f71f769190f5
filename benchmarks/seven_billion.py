"""A 7B model on a small machine: LLaMA-7B's shapes with random weights, pruned by 20 % layer by layer.

Makes "A model of 7B's shapes" of research/results.md. Takes 18 minutes with `--layers 4`, hours with all 32.

    python benchmarks/seven_billion.py --folder runs/7b --calibration boolq-passages

Writes the model once (13.5 GB, sharded, bfloat16), and prunes it with the default steps and little text. Prints what
each stage took, the most memory that the process held, and how many times the weights of all layers were read; at
last loads the saved folder and predicts a token. Weights are random, so nothing is said about quality here. Needs
55 GB of disk.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cyclopts import run
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

import adapruner
from adapruner.base.progress import Advance, Reporter
from adapruner.model.layers import _Stream
from adapruner.model.loading import empty_model, load_model
from adapruner.model.places import find_model
from adapruner.text.reading import read_documents
from adapruner.text.sources import parse_source

LAYERS_PER_SHARD = 4
LITTLE_TEXT: dict[str, Any] = {"ratio": 0.2, "seq_len": 32, "compensation_windows": 32, "heal": "1k", "limit": 4}


class Reads:
    """Counts how many times every stage reads the weights of all layers.

    Args:
        weights: of all layers.
    """

    def __init__(self, weights: int) -> None:
        self.weights, self.begun, self.times = weights, list[str](), defaultdict[str, float](float)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """While it lasts, what is read counts."""
        put, begin = _Stream._put, Reporter.stage

        @contextmanager
        def noted(reporter: Reporter, stage: str, total: int | None = 1) -> Iterator[Advance]:
            self.begun.append(stage)
            with begin(reporter, stage, total) as advance:
                yield advance
            self.begun.pop()
            print(f"{stage}: all layers read {self.times.pop(stage, 0):.1f} times", flush=True)

        def counting(stream: _Stream, weights: dict[str, Tensor]) -> None:
            if weights is not stream._placeholders:
                read = sum(weight.numel() for weight in weights.values())
                self.times[self.begun[-1] if self.begun else ""] += read / self.weights
            put(stream, weights)

        with patch.object(_Stream, "_put", counting), patch.object(Reporter, "stage", noted):
            yield


def main(*, folder: Path, calibration: str, layer_wise: bool = True, layers: int = 32) -> None:
    """Writes, prunes, loads; rerun to resume."""
    model, output = folder / "dense", folder / "run"
    if not (model / "config.json").is_file():
        write_model(model, calibration, layers)
    empty = empty_model(LlamaConfig.from_pretrained(model))
    reads = Reads(sum(weight.numel() for name, weight in empty.named_parameters() if ".layers." in name))
    started = time.perf_counter()
    with reads.counted():
        result = adapruner.prune(model, calibration, output=output, layer_wise=layer_wise, **LITTLE_TEXT)
    before, *_, after = (of_run.parameters for of_run in result.result.models)
    for stage, cost in result.result.stages.items():
        print(f"{stage}: {cost.seconds:.0f} s, at most {cost.peak_memory_mib / 1024:.1f} GiB")
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
