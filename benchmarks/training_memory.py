"""What fits where: the memory of training a pruned Llama 3.1 8B or 70B, by arithmetic (docs/guides/large-models.md).

python benchmarks/training_memory.py
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from adapruner.config import RecoveryOptions
from adapruner.memory import training_memory
from adapruner.models import empty_model

GB = 10**9
# The config fields of the dense model; and the channels with which a fifth of its weights is removed.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "8B": (
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
        10240,
    ),
    "70B": (
        {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
        21504,
    ),
}


def main() -> None:
    """Prints a row for every model, way of training and number of GPUs: GB on each GPU."""
    for name, (fields, channels) in MODELS.items():
        shared: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128256}
        dense, pruned = (
            empty_model(LlamaConfig(**fields | shared | changes)) for changes in ({}, {"intermediate_size": channels})
        )
        for train in ("lora", "full"):
            for teacher in (None, dense):
                options = RecoveryOptions(train=train, micro_batch_size=1, seq_len=2048, gradient_checkpointing=True)
                sizes = {
                    gpus: training_memory(pruned, teacher, options, torch.bfloat16, gpus) for gpus in (1, 2, 4, 8, 16)
                }
                row = " | ".join(f"{sum(terms.values()) / GB:.0f}" for terms in sizes.values())
                print(f"| {name} | {train} | {'yes' if teacher else 'no'} | {row} |", flush=True)


if __name__ == "__main__":
    main()
