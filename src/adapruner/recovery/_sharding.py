"""Training with FSDP, which shards the weights of a model over processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import fsdp_utils
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel, Trainer
from transformers.trainer import FSDP_MODEL_NAME

from adapruner.errors import AdaPrunerError
from adapruner.models._deferred import read_parts
from adapruner.models._layers import decoder_layers
from adapruner.processes import this_process


def refuse_other_sharding(checkpoint: Path, sharded: bool) -> None:
    """Refuses to resume training with FSDP that began without it, or the reverse: the form of the weights differs."""
    if (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file() != sharded:
        way = "without FSDP" if sharded else "with FSDP: launch it as before, with any number of processes, also one"
        raise AdaPrunerError(
            f"the training in {checkpoint.parent} resumes only {way}; delete that folder to start the training again"
        )


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """Shares the weights of a deferred model out over all processes, in place, to be run, not trained; each reads its
    part. A layer has its weights whole while it runs; all else is whole from the first call of the model on."""
    PartialState()  # connects the processes, as the Trainer does later
    state, device = model.state_dict(), model.device
    shares: Any = {"mesh": init_device_mesh(device.type, (this_process().count,))}
    cast(nn.Module, model)._apply(lambda tensor: tensor.to("meta") if isinstance(tensor, nn.Parameter) else tensor)
    model.tie_weights(recompute_mapping=False)
    for layer in decoder_layers(model):
        fully_shard(layer, **shares)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is not head.weight:
        fully_shard(embedding, **shares)
    fully_shard(model, reshard_after_forward=False, **shares)
    read_parts(model, state, device)
    model.tie_weights(recompute_mapping=False)
    return model


@contextmanager
def sharded(trainer: Trainer) -> Iterator[None]:
    """Trains with FSDP 2 while it lasts: every process reads its part of the weights, where accelerate would have the
    first one hold and broadcast them; the loss is computed and gradients are added up in float32; and checkpoints are
    saved unsharded. At the end, the first process has all weights in main memory, in modules of their original classes,
    to be saved and not run; the others keep their shards."""
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise AdaPrunerError(f"FSDP version {plugin.fsdp_version} is not supported: launch with --fsdp_version 2")
    plugin.cpu_ram_efficient_loading = True
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    if isinstance(policy := plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=torch.float32)

    def load(accelerator: Any, model: nn.Module, state: Mapping[str, Tensor], cpu_offload: bool = False) -> None:
        read_parts(model, state, torch.device("cpu") if cpu_offload else accelerator.device)

    before, fsdp_utils.fsdp2_load_full_state_dict = fsdp_utils.fsdp2_load_full_state_dict, load
    try:
        yield
    finally:
        fsdp_utils.fsdp2_load_full_state_dict = before
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not this_process().leads:
        return
    model: Any = trainer.model
    for module in model.modules():
        if isinstance(module, FSDPModule):  # FSDP derives a class from this one and the original
            module.__class__ = type(module).__mro__[2]
    for path, weight in whole.items():
        module_path, _, name = path.rpartition(".")
        parameters = model.get_submodule(module_path)._parameters
        if name in parameters:
            parameters[name] = nn.Parameter(weight, requires_grad=False)
