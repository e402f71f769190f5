"""Cutting: from a model and a plan to a model that is really smaller."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.models import PRUNED_CLASSES, architecture_of
from adapruner.planning import BlockPlan, PruningPlan
from adapruner.structure import Structure, TensorSlice
from adapruner.surgery._compensation import Compensation, compensate


def prune_model(
    model: PreTrainedModel, structure: Structure, plan: PruningPlan, compensation: Compensation | None = None
) -> PreTrainedModel:
    """A new model without the groups that the plan removes.

    Tensors from which nothing goes are shared with the given model, which stays as it is.

    Args:
        compensation: how what stays of the row-wise projections takes over; None leaves it as it was.

    Raises:
        AdaPrunerError: the plan was made for another model.
    """
    plan.check_fits(structure)
    added_biases = _row_wise_modules(structure) if compensation and compensation.adds_bias else []
    with init_empty_weights(include_buffers=False):
        pruned: Any = _empty_pruned(model, structure, plan, added_biases)
    pruned.load_state_dict(_pruned_state(model.state_dict(), structure, plan, compensation), assign=True)
    pruned.tie_weights()
    pruned.generation_config = model.generation_config
    # Buffers that are not saved (rotary frequencies) were made on the CPU.
    moved: PreTrainedModel = pruned.to(model.device).train(model.training)
    return moved


def _empty_pruned(
    model: PreTrainedModel, structure: Structure, plan: PruningPlan, added_biases: list[str]
) -> PreTrainedModel:
    """The pruned model before its weights are set: of the class that it was where all layers are alike and that class
    takes the counts, else of the class whose config says what each layer has less of."""
    architecture = architecture_of(model.config)
    layers: dict[int, dict[str, int]] = {}
    for block, block_plan in zip(structure.blocks, plan.blocks, strict=True):
        counts = {field: amount * len(block_plan.kept) for field, amount in block.config_counts.items()}
        layers.setdefault(block.layer, {}).update(counts)
    fields = model.config.to_dict()
    fields |= {architecture.config_fields.head_dim: architecture.head_dim(model.config)}
    if all(counts == layers[0] for counts in layers.values()) and not added_biases:
        # Some families refuse numbers of heads that do not divide the hidden size.
        with contextlib.suppress(StrictDataclassError):
            return type(model)(type(model.config).from_dict(fields | layers[0]))
    pruned_class: Any = PRUNED_CLASSES[structure.model_type]
    differences: dict[str, Any] = {"per_layer_config": layers}
    if added_biases:
        differences["added_biases"] = added_biases
    pruned: PreTrainedModel = pruned_class(pruned_class.config_class.from_dict(fields | differences))
    return pruned


def _row_wise_modules(structure: Structure) -> list[str]:
    """Paths of the row-wise projections within a layer."""
    paths = {block.row_wise.parameter.split(f".{block.layer}.", 1)[1] for block in structure.blocks}
    return sorted(path.removesuffix(".weight") for path in paths)


def _pruned_state(
    state: dict[str, Tensor], structure: Structure, plan: PruningPlan, compensation: Compensation | None
) -> dict[str, Tensor]:
    """Every tensor with the indices of the kept groups only, compensated."""
    for index, (block, block_plan) in enumerate(zip(structure.blocks, plan.blocks, strict=True)):
        name = block.row_wise.parameter
        bias_name = name.removesuffix("weight") + "bias"
        original = state[name]
        if compensation and compensation.adds_bias and bias_name not in state:
            state[bias_name] = original.new_zeros(len(original))
        if len(block_plan.kept) == block.groups:
            continue
        for part in block.slices:
            tensor = state[part.parameter]
            state[part.parameter] = tensor.index_select(part.axis, kept_indices(block_plan, part).to(tensor.device))
        if compensation:
            kept = kept_indices(block_plan, block.row_wise)
            state[name], bias = compensate(original, compensation.moments[index], kept, compensation.form)
            if compensation.adds_bias:
                state[bias_name] = state[bias_name] + bias
    return state


def kept_indices(plan: BlockPlan, part: TensorSlice) -> Tensor:
    """[kept], int64: the indices of a tensor's pruned axis that stay."""
    return (torch.tensor(plan.kept)[:, None] * part.width + torch.arange(part.width)).flatten()
