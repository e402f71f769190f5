"""Bad options of a training are refused before any model is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from adapruner.config import RecoveryOptions
from adapruner.errors import AdaPrunerError, reason
from adapruner.processes import this_process

# The environment variables that select the visible accelerators.
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}


def check_device(device: torch.device) -> None:
    """Refuses a GPU that the Trainer does not train on: in a single process, any but the first.

    Raises:
        AdaPrunerError: with a way to use that GPU.
    """
    if device.type != "cpu" and device.index and this_process().count == 1:
        raise AdaPrunerError(
            f"training runs on the first accelerator and not on {device}: set"
            f" {_VISIBLE.get(device.type, 'its variable for visible devices')}={device.index} and leave `device` out"
        )


def check_processes(options: RecoveryOptions, device: torch.device) -> None:
    """Refuses options with which the processes cannot train together.

    Raises:
        AdaPrunerError: with the reason, and the numbers.
    """
    size, processes = options.batch_size, this_process().count
    if size % processes:
        raise AdaPrunerError(f"`batch_size` {size} cannot be divided among {processes} processes")
    # On a CPU, accelerate ignores FSDP.
    if options.own_writing and this_process().shares_weights and device.type != "cpu":
        raise AdaPrunerError("a model that is sharded by FSDP cannot write text: leave `own_writing` out")


def check_optimizer(name: str) -> None:
    """Refuses an optimizer that the Trainer does not know, or whose package is not installed.

    Raises:
        AdaPrunerError: with the known names, or the package.
    """
    try:
        known: Any = nn.Linear(1, 1)
        Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("unused", **optimizer_arguments(name)), known)
    except (ImportError, NotImplementedError, ValueError) as error:
        raise AdaPrunerError(f"`optimizer` {name}: {reason(error)}") from None


def optimizer_arguments(name: str) -> dict[str, Any]:
    """The arguments of the Trainer; GaLore and APOLLO project the gradients of all linear layers."""
    return {"optim": name, "optim_target_modules": "all-linear"}
