"""How the scales of a pruned model are tuned."""

from __future__ import annotations

import torch

from adapruner.config import RecoveryOptions

_BATCH = 16


def scale_options(seed: int, device: torch.device, processes: int = 1) -> RecoveryOptions:
    """The options of the last step of pruning: with frozen weights, every input of every linear layer gets a scale
    (IA3, arXiv 2205.05638), learnt in one pass over the text of the compensation from the predictions of the dense
    model alone. GRASPrune (arXiv 2604.19398) tunes scales of the kept groups;
    docs/experiments.md compares several choices of scales.

    Args:
        device: of the model. On an accelerator, memory is short and gradient checkpointing is on.
        processes: how many train together, and share every batch.
    """
    return RecoveryOptions(
        method="distillation",
        train="ia3",
        epochs=1,
        batch_size=max(1, _BATCH // processes) * processes,
        gradient_checkpointing=device.type != "cpu",
        learning_rate=5e-3,
        warmup_steps=5,
        label_weight=0.0,
        validation=16,
        seed=seed,
    )
