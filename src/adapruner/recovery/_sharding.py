"""Training with FSDP, which shares out the weights of a model among processes."""

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
    """The number of processes may change between calls, but not whether FSDP shares out the weights: the Trainer then
    saves them otherwise.

    Raises:
        AdaPrunerError: with the way there.
    """
    if (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file() != sharded:
        way = "without FSDP" if sharded else "with FSDP: launch it as before, with any number of processes, also one"
        raise AdaPrunerError(
            f"the training in {checkpoint.parent} resumes only {way}; delete that folder to start the training again"
        )


def set_up_fsdp(trainer: Trainer) -> None:
    """By default FSDP gives the loss, and adds up gradients, in the dtype of the products; here both are float32. What
    training resumes from is saved whole, whatever the launcher says: any number of processes reads that, without
    unpickling.

    Raises:
        AdaPrunerError: it is FSDP 1, whose weights `gather` cannot give back.
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
    """Gives the first process the whole of every weight that FSDP has shared out, in main memory, and makes its modules
    what they were before; the others keep their part. The model is there to be saved, not to be run."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not this_process().leads:
        return
    whole = cast(nn.Module, trainer.model)
    for module in whole.modules():
        if isinstance(module, FSDPModule):  # a class that was derived for the occasion from this and the real one
            cast(Any, module).__class__ = type(module).__mro__[2]
    for name, weight in state.items():
        path, _, own = name.rpartition(".")
        module = whole.get_submodule(path)
        if own in module._parameters:
            module._parameters[own] = nn.Parameter(weight, requires_grad=False)
