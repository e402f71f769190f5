"""Cutting: from a model and a plan to a model that is really smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from adapruner.models import (
    Architecture,
    fields_by_layer,
    is_pruned,
    is_streamed,
    layer_devices,
    loaded_layer,
    move_resident,
    place_layers,
    stream_from_memory,
    stream_layers,
)
from adapruner.planning import BlockPlan, PruningPlan
from adapruner.structure import Block, Structure, TensorSlice
from adapruner.surgery._compensation import Compensation, compensate
from adapruner.surgery._stock import fields_of_all, fields_of_layers, stock_models


def prune_model(
    model: PreTrainedModel, structure: Structure, plan: PruningPlan, compensation: Compensation | None = None
) -> PreTrainedModel:
    """A new model without the groups that the plan removes.

    It is of a stock class where all layers are alike and one takes them, else of the class whose config says what each
    layer has less of. Tensors from which nothing is removed are shared with the given model, which is not changed. Of a
    model whose layers are streamed, it is in the memory of the CPU, and its layers are streamed from there.

    Args:
        compensation: how the kept part of the row-wise projections is corrected; None leaves it as it was.

    Raises:
        AdaPrunerError: the plan was made for another model.
    """
    plan.check_fits(structure)
    kept = kept_layers(structure, plan)
    state = _pruned_state(model, structure, plan, kept, compensation)
    pruned: Any = _empty_pruned(model, structure, plan, kept, state, compensation)
    pruned.load_state_dict(state, assign=True)
    pruned.tie_weights()
    pruned.generation_config = model.generation_config
    if is_streamed(model):
        stream_from_memory(pruned, model.device)
    else:
        # Buffers that are not saved (rotary frequencies) were made on the CPU.
        devices = layer_devices(model)
        place_layers(pruned, model.device, [devices[layer] for layer in kept])
    finished: PreTrainedModel = pruned.train(model.training)
    return finished


def prune_on_reading(
    model: PreTrainedModel, structure: Structure, plan: PruningPlan, compensation: Compensation | None = None
) -> PreTrainedModel:
    """A pruned copy of a model whose layers are streamed, for a single run over it: no layer is in memory, each is cut
    whenever it is read.

    Args:
        compensation: see `prune_model`.

    Raises:
        AdaPrunerError: the plan was made for another model.
    """
    plan.check_fits(structure)
    kept, prefix = kept_layers(structure, plan), f"{structure.architecture.layers}."
    pruned: Any = _empty_pruned(model, structure, plan, kept, None, compensation)
    resident = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)}
    pruned.load_state_dict(resident, strict=False, assign=True)
    pruned.tie_weights()
    move_resident(pruned, model.device)
    stream_layers(pruned, [partial(_pruned_layer, model, layer, structure, plan, compensation) for layer in kept])
    finished: PreTrainedModel = pruned.train(model.training)
    return finished


def kept_layers(structure: Structure, plan: PruningPlan) -> list[int]:
    """The layers that are not removed, from the input to the output."""
    gone = structure.removed_layers([len(block.kept) for block in plan.blocks])
    return [layer for layer in range(structure.layers) if layer not in gone]


@init_empty_weights(include_buffers=False)  # type: ignore[untyped-decorator]
@no_init_weights()
def _empty_pruned(
    model: PreTrainedModel,
    structure: Structure,
    plan: PruningPlan,
    kept: Sequence[int],
    state: Mapping[str, Tensor] | None,
    compensation: Compensation | None,
) -> PreTrainedModel:
    """The pruned model before its weights are set; without a state that tells their shapes, of no stock class."""
    architecture = structure.architecture
    fields = fields_of_layers(model.config, fields_of_all(model, architecture), kept)
    if architecture.attention:
        fields["head_dim"] = architecture.head_dim(model.config.per_layer_config[0])
    of_layers = _layer_fields(model, architecture, structure, plan)
    layers = {new: of_layers[old] for new, old in enumerate(kept) if old in of_layers}
    common: dict[str, Any] = {}
    for own in layers.values():
        common |= own
    # A layer without heads says nothing of heads. No stock class takes a count of 0.
    if state and all(common.values()) and all(own.items() <= common.items() for own in layers.values()):
        shapes = {name: tensor.shape for name, tensor in state.items()}
        for stock in stock_models(architecture, fields | common):
            if {name: tensor.shape for name, tensor in stock.state_dict().items()} == shapes:
                return stock
    if of_stock := fields.pop("per_layer_config", None):
        fields["stock_per_layer_config"] = of_stock
        stock_layers = fields_by_layer(of_stock)
        layers = {index: {**stock_layers.get(index, {}), **layers.get(index, {})} for index in range(len(kept))}
    fields |= {"per_layer_config": layers}
    if architecture.config_fields.head_numbers:
        fields |= {architecture.config_fields.head_numbers: None}
    if compensation and compensation.adds_bias:
        projected = {block.row_wise_path for block in structure.blocks if block.is_projected and not block.experts}
        fields |= {"added_biases": sorted(projected)}
    config = architecture.pruned_class.config_class.from_dict(fields)
    pruned: PreTrainedModel = architecture.pruned_class(config)
    return pruned


def _layer_fields(
    model: PreTrainedModel, architecture: Architecture, structure: Structure, plan: PruningPlan
) -> dict[int, dict[str, Any]]:
    """The config fields of each layer."""
    layers: dict[int, dict[str, Any]] = {}
    for block, block_plan in zip(structure.blocks, plan.blocks, strict=True):
        own = layers.setdefault(block.layer, {})
        own |= block.config_fields(len(block_plan.kept))
        numbered = architecture.config_fields.head_numbers
        if numbered and block.kind == "heads":
            before = getattr(model.config.per_layer_config[block.layer], numbered, None)
            if before or len(block_plan.kept) < block.groups:
                own[numbered] = [(before or range(block.groups))[group] for group in block_plan.kept]
    # What was removed whole before has no block.
    removable = architecture.pruned_class.family.removable if is_pruned(model.config) else ()
    for layer, part in product(range(structure.layers), removable):
        if getattr(model.config.per_layer_config[layer], part.fields[0], None) == 0:
            layers.setdefault(layer, {}).update(dict.fromkeys(part.fields, 0))
    return layers


def _pruned_state(
    model: PreTrainedModel,
    structure: Structure,
    plan: PruningPlan,
    kept: Sequence[int],
    compensation: Compensation | None,
) -> dict[str, Tensor]:
    """Every tensor with the indices of the kept groups only, compensated; kept layers are numbered anew."""
    prefix = f"{structure.architecture.layers}."
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)}
    for new, layer in enumerate(kept):
        with loaded_layer(model, layer) as module:
            own = _pruned_layer(model, layer, structure, plan, compensation)
            if is_streamed(model):
                own = _in_memory(own, module.state_dict())
        state |= {f"{prefix}{new}.{name}": tensor for name, tensor in own.items()}
    return state


def _pruned_layer(
    model: PreTrainedModel, layer: int, structure: Structure, plan: PruningPlan, compensation: Compensation | None
) -> dict[str, Tensor]:
    """The tensors of a layer, by their names within it, with the indices of the kept groups only, compensated."""
    architecture = structure.architecture
    prefix = f"{architecture.layers}.{layer}."
    with loaded_layer(model, layer) as module:
        own = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
    for index, (block, block_plan) in enumerate(zip(structure.blocks, plan.blocks, strict=True)):
        if block.layer == layer and block_plan.kept:
            _prune_block(own, index, block, block_plan, compensation)
        elif block.layer == layer:
            path = f"{prefix}{architecture.module_of(block.kind)}."
            own = {name: tensor for name, tensor in own.items() if not name.startswith(path)}
    return {name.removeprefix(prefix): tensor for name, tensor in own.items()}


def _in_memory(own: dict[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a streamed layer on the CPU. Of a layer that is cut none may lie in the file any more: one norm
    that does keeps all of the layer mapped, which counts as memory."""
    shared = {name for name, tensor in own.items() if name in whole and tensor.data_ptr() == whole[name].data_ptr()}
    return {
        name: (tensor if name not in shared or shared == own.keys() else tensor.clone()).cpu()
        for name, tensor in own.items()
    }


def _prune_block(
    state: dict[str, Tensor], index: int, block: Block, plan: BlockPlan, compensation: Compensation | None
) -> None:
    """Replaces the tensors of a block."""
    form = compensation.form_for(block) if compensation else None
    row_wise = block.row_wise if form else None
    if row_wise and compensation and compensation.adds_bias and not block.experts:
        weight = row_wise.as_projection(state[row_wise.parameter])
        state.setdefault(f"{row_wise.module}.bias", weight.new_zeros(len(weight)))
    if len(plan.kept) == block.groups:
        return
    for parameter, parts in block.slices_by_parameter.items():
        if row_wise is None or parameter != row_wise.parameter:
            state[parameter] = _kept_part(state[parameter], plan, parts)
    if row_wise and compensation and form:
        weights = row_wise.as_projections(state[row_wise.parameter])
        kept = kept_indices(plan, [row_wise], weights.shape[2])
        moments = compensation.moments[index].of_experts()
        each = [compensate(*of_expert, form) for of_expert in zip(weights, moments, kept, strict=True)]
        state[row_wise.parameter] = row_wise.as_stored(torch.stack([weight for weight, _ in each]))
        if not block.experts and compensation.adds_bias:
            state[f"{row_wise.module}.bias"] = state[f"{row_wise.module}.bias"] + each[0][1]


def _kept_part(tensor: Tensor, plan: BlockPlan, parts: Sequence[TensorSlice]) -> Tensor:
    """The tensor with the indices of the kept groups only.

    Args:
        parts: the slices of the groups in this tensor.
    """
    axis, of_experts = parts[0].stored_axis, parts[0].of_experts(tensor)
    kept = kept_indices(plan, parts, of_experts.shape[1 + axis]).to(tensor.device)
    each = [own.index_select(axis, stays) for own, stays in zip(of_experts, kept, strict=True)]
    return torch.stack(each) if parts[0].experts else each[0]


def kept_indices(plan: BlockPlan, parts: Sequence[TensorSlice], size: int) -> Tensor:
    """[experts, kept], int64, ascending: the indices of the pruned axis of one tensor that stay, out of `size`; one row
    where there are no experts."""
    experts = parts[0].experts or 1
    is_kept = torch.zeros(plan.groups, dtype=torch.bool)
    is_kept[list(plan.kept)] = True
    stays, of_experts = torch.ones(experts, size, dtype=torch.bool), is_kept.view(experts, -1)
    for part in parts:
        stays[:, part.offset : part.offset + of_experts.shape[1] * part.width] = of_experts.repeat_interleave(
            part.width, 1
        )
    return stays.nonzero()[:, 1].view(experts, -1)
