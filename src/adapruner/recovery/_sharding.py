"""Training with FSDP, which shards the weights of a model over processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import Trainer
from transformers.trainer import FSDP_MODEL_NAME

from adapruner.errors import AdaPrunerError
from adapruner.processes import this_process


def refuse_other_sharding(checkpoint: Path, sharded: bool) -> None:
    """Refuses to resume training with FSDP that began without it, or the reverse: the Trainer saves weights in another
    form. The number of processes may change.

    Raises:
        AdaPrunerError: the checkpoint was saved the other way.
    """
    if (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file() != sharded:
        way = "without FSDP" if sharded else "with FSDP: launch it as before, with any number of processes, also one"
        raise AdaPrunerError(
            f"the training in {checkpoint.parent} resumes only {way}; delete that folder to start the training again"
        )


def set_up_fsdp(trainer: Trainer) -> None:
    """Sets FSDP to compute the loss and to add up gradients in float32; its default is the dtype of the products.
    Checkpoints are saved unsharded, whatever the launcher says: any number of processes can read them, without
    unpickling.

    Raises:
        AdaPrunerError: it is FSDP 1, whose weights `gather` cannot restore.
    """
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise AdaPrunerError(f"FSDP version {plugin.fsdp_version} is not supported: launch with --fsdp_version 2")
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def gather(trainer: Trainer) -> None:
    """Gives the first process all weights unsharded, in main memory, and restores the classes of its modules; the other
    processes keep their shards. The model can be saved, not run."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not this_process().leads:
        return
    model = cast(nn.Module, trainer.model)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # FSDP derives a class from this one and the original
            cast(Any, module).__class__ = type(module).__mro__[2]
    for path, weight in state.items():
        module_path, _, name = path.rpartition(".")
        module = model.get_submodule(module_path)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)
