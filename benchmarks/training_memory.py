"""What fits where: the memory of training a pruned Llama 3.1 8B or 70B, by arithmetic (docs/guides/large-models.md).

Takes seconds.

python benchmarks/training_memory.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.pytorch_utils import Conv1D

from adapruner.measurement.taylor import saved_activations
from adapruner.model.layers import decoder_layers
from adapruner.model.loading import empty_model
from adapruner.options import RecoveryOptions
from adapruner.run.memory import bytes_of_predictions

GB, FLOAT32 = 10**9, 4
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


def training_memory(
    student: Any, teacher: Any, options: RecoveryOptions, dtype: torch.dtype, processes: int = 1
) -> dict[str, int]:
    """Bytes on each device at the peak of a training, by purpose, without the program itself and what an allocator
    keeps. Weights that are trained are in float32.

    Args:
        student, teacher: on the meta device; None for training on labels.
        dtype: of frozen weights, and of products; bfloat16 where that is native.
        options: the optimizer is AdamW, with two moments of each trained number, in float32 or in 8 bits. A step has
            several micro-batches, so that there are gradients while the next one runs.
        processes: that share all weights with FSDP, each with a device.
    """
    trains_all, width = options.train == "full", dtype.itemsize
    layers = decoder_layers(student)
    weights, largest = _count(student), max(map(_count, layers))
    trained = weights if trains_all else sum(options.lora_rank * sum(shape) for shape in _linear_shapes(student))
    terms = {
        "student": trained * FLOAT32 + (0 if trains_all else weights * width),
        "gradients": trained * FLOAT32,
        "optimizer": 2 * trained * (1 if "8bit" in options.optimizer else FLOAT32),
        "teacher": 0 if teacher is None else _count(teacher) * width,
    }
    terms = {term: size // processes for term, size in terms.items()}
    shares = processes > 1
    if trains_all and width < FLOAT32 and not shares:
        terms["weights in products"] = weights * width
    if teacher is not None and shares:
        terms["head of the teacher"] = _outside(teacher) * width
    vocabulary, hidden = student.get_input_embeddings().weight.shape
    tokens, saved = options.micro_batch_size * options.seq_len, saved_activations(student.config, dtype)
    kept = len(layers) * hidden * width + saved if options.gradient_checkpointing else len(layers) * saved
    # Each gathered weight that is trained has a gradient, which is added up and scattered from a copy.
    with_gradients = width * (2 if trains_all else 1)
    loss_is_differentiated = {
        "activations": int(tokens * kept),
        "predictions": bytes_of_predictions(tokens, vocabulary),
        "head": _outside(student) * with_gradients if shares else 0,
    }
    first_layer_is_differentiated = {
        "activations": int(tokens * saved),
        "layers": 2 * largest * with_gradients if shares else 0,
    }
    return terms | max(loss_is_differentiated, first_layer_is_differentiated, key=lambda peak: sum(peak.values()))


def _outside(model: Any) -> int:
    """Weights outside of layers, without an embedding that is not the output matrix too."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    separate = 0 if embedding is head else embedding.numel()
    return _count(model) - sum(map(_count, decoder_layers(model))) - separate


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _linear_shapes(model: Any) -> list[tuple[int, ...]]:
    """The shapes of the matrices that get adapters."""
    modules = [module for layer in decoder_layers(model) for module in layer.modules()]
    return [tuple(module.weight.shape) for module in modules if isinstance(module, nn.Linear | Conv1D)]


if __name__ == "__main__":
    main()
