"""Bad options of a training are refused before any model is loaded."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from adapruner.config import RecoveryOptions
from adapruner.errors import AdaPrunerError, reason
from adapruner.processes import this_process

# The environment variables that select the visible accelerators.
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}


def check_device(device: torch.device) -> None:
    """Refuses a GPU that the Trainer does not train on: in a single process, any but the first."""
    if device.type != "cpu" and device.index and this_process().count == 1:
        raise AdaPrunerError(
            f"training runs on the first accelerator and not on {device}: set"
            f" {_VISIBLE.get(device.type, 'its variable for visible devices')}={device.index} and leave `device` out"
        )


def check_processes(options: RecoveryOptions) -> None:
    """Refuses a batch that the processes cannot share equally."""
    size, processes = options.batch_size, this_process().count
    if size % processes:
        raise AdaPrunerError(f"`batch_size` {size} cannot be divided among {processes} processes")


def check_trainer_options(options: RecoveryOptions) -> None:
    """Refuses an optimizer or an experiment tracker that the Trainer does not know, or whose package is missing."""
    try:
        model: Any = nn.Linear(1, 1)
        arguments: Any = TrainingArguments("unused", **trainer_options(options))
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, NotImplementedError, ValueError) as error:
        raise AdaPrunerError(f"`optimizer` {options.optimizer}: {reason(error)}") from None
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise AdaPrunerError(f"`report_to` {options.report_to}: {reason(error)}") from None
    # The Trainer's default is a folder that is removed at the end of the training.
    if "tensorboard" in arguments.report_to and "TENSORBOARD_LOGGING_DIR" not in os.environ:
        raise AdaPrunerError(
            "`report_to` tensorboard: set the environment variable TENSORBOARD_LOGGING_DIR to a folder"
        )


def trainer_options(options: RecoveryOptions) -> dict[str, Any]:
    """The Trainer's arguments for the optimizer and the tracker; GaLore and APOLLO project the gradients of all linear
    layers."""
    return {"optim": options.optimizer, "optim_target_modules": "all-linear", "report_to": options.report_to}
