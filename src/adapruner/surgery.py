"""Cutting: from a model and a plan to a model that is really smaller."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from adapruner.models import PRUNED_CLASSES, architecture_of
from adapruner.planning import PruningPlan
from adapruner.structure import Structure


def prune_model(model: PreTrainedModel, structure: Structure, plan: PruningPlan) -> PreTrainedModel:
    """A new model without the groups that the plan removes.

    Tensors from which nothing goes are shared with the given model, which stays as it is.

    Raises:
        AdaPrunerError: the plan was made for another model.
    """
    plan.check_fits(structure)
    config = _pruned_config(model.config, structure, plan)
    with init_empty_weights(include_buffers=False):
        pruned: Any = PRUNED_CLASSES[structure.model_type](config)
    pruned.load_state_dict(_pruned_state(model.state_dict(), structure, plan), assign=True)
    pruned.tie_weights()
    pruned.generation_config = model.generation_config
    # Buffers that are not saved (rotary frequencies) were made on the CPU.
    moved: PreTrainedModel = pruned.to(model.device).train(model.training)
    return moved


def _pruned_config(config: PreTrainedConfig, structure: Structure, plan: PruningPlan) -> PreTrainedConfig:
    """The config of the pruned model: the dense one plus what each layer has less of."""
    architecture = architecture_of(config)
    overrides: dict[int, dict[str, int]] = {}
    for block, block_plan in zip(structure.blocks, plan.blocks, strict=True):
        counts = {field: amount * len(block_plan.kept) for field, amount in block.config_counts.items()}
        overrides.setdefault(block.layer, {}).update(counts)
    fields = config.to_dict()
    fields |= {architecture.config_fields.head_dim: architecture.head_dim(config), "per_layer_config": overrides}
    return PRUNED_CLASSES[structure.model_type].config_class.from_dict(fields)


def _pruned_state(state: dict[str, Tensor], structure: Structure, plan: PruningPlan) -> dict[str, Tensor]:
    """Every tensor with the indices of the kept groups only."""
    for block, block_plan in zip(structure.blocks, plan.blocks, strict=True):
        if len(block_plan.kept) == block.groups:
            continue
        kept = torch.tensor(block_plan.kept)
        for part in block.slices:
            tensor = state[part.parameter]
            indices = (kept[:, None] * part.width + torch.arange(part.width)).flatten().to(tensor.device)
            state[part.parameter] = tensor.index_select(part.axis, indices)
    return state
