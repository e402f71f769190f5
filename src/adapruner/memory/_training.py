"""The memory that training needs, computed from shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapruner.config import RecoveryOptions
from adapruner.measurement import saved_activations
from adapruner.memory._stages import Terms
from adapruner.models import decoder_layers

# Predictions whose losses are computed at once, and the float32 tensors of that size that are held meanwhile.
_ROWS, _TENSORS = 256, 5
_FLOAT32 = 4


def training_memory(
    student: Any, teacher: Any, options: RecoveryOptions, dtype: torch.dtype, processes: int = 1
) -> Terms:
    """Bytes on each device at the peak of a training, by purpose, without the program itself and what an allocator
    keeps. Weights that are trained are in float32.

    Args:
        student, teacher: on the meta device; None for training on labels.
        dtype: of frozen weights, and of products; bfloat16 where that is native.
        options: the optimizer is AdamW, with two moments of each trained number, in float32 or in 8 bits.
        processes: that share all weights with FSDP, each with a device.
    """
    computing = dtype.itemsize
    whole, of_layers = _count(student), [_count(layer) for layer in decoder_layers(student)]
    trains_all = options.train == "full"
    trained = whole if trains_all else sum(options.lora_rank * sum(shape) for shape in _linear_shapes(student))
    moment = 1 if "8bit" in options.optimizer else _FLOAT32
    terms = {
        "student": trained * _FLOAT32 + (0 if trains_all else whole * computing),
        "gradients": trained * _FLOAT32,
        "optimizer": 2 * trained * moment,
        "teacher": 0 if teacher is None else _count(teacher) * computing,
    }
    if processes > 1:
        terms = {term: size // processes for term, size in terms.items()}
        # A layer that runs, one that is fetched ahead, and all outside of layers; of what is trained the gradients too.
        terms["gathered"] = (1 + trains_all) * _gathered(student) * computing
        terms["gathered"] += 0 if teacher is None else _gathered(teacher) * computing
    elif trains_all and computing < _FLOAT32:
        terms["cast weights"] = whole * computing
    tokens = options.micro_batch_size * options.seq_len
    vocabulary, width = student.get_input_embeddings().weight.shape
    saved = saved_activations(student.config, dtype)
    layers = width * computing * len(of_layers) + saved if options.gradient_checkpointing else saved * len(of_layers)
    return terms | {
        "activations": int(tokens * layers),
        "predictions": min(_ROWS, tokens) * vocabulary * _FLOAT32 * _TENSORS,
    }


def _gathered(model: Any) -> int:
    """Weights of a model that are whole on each device while it runs."""
    of_layers = [_count(layer) for layer in decoder_layers(model)]
    return _count(model) - sum(of_layers) + 2 * max(of_layers)


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _linear_shapes(model: Any) -> list[tuple[int, ...]]:
    """The shapes of the matrices that get adapters."""
    modules = [module for layer in decoder_layers(model) for module in layer.modules()]
    return [tuple(module.weight.shape) for module in modules if isinstance(module, nn.Linear | Conv1D)]
