"""Cutting: from a model and a plan to a smaller model, whose kept weights take over from the removed ones."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from adapruner.budget.plan import BlockPlan, PruningPlan
from adapruner.measurement.moments import InputMoments, solve_damped
from adapruner.model.architecture import architecture_of, fields_by_layer, lacks_attention, stock_fields
from adapruner.model.layers import (
    allow_any_width,
    decoder_layers,
    is_streamed,
    layer_devices,
    loaded_layer,
    move_resident,
    place_layers,
    stream_layers,
    without_weights,
)
from adapruner.model.wrapper import give_wrapper, wrapper_of
from adapruner.remote_code.modeling_pruned import ATTENTION
from adapruner.structure.blocks import Structure, TensorSlice


def prune_model(
    model: PreTrainedModel,
    structure: Structure,
    plan: PruningPlan,
    compensation: Mapping[int, InputMoments] | None = None,
) -> PreTrainedModel:
    """A new model without the groups that the plan removes.

    It is of a stock class if all layers have the same shapes and a stock class supports them, else of the class whose
    config lists what each layer has less of. Tensors from which nothing is removed are shared with the given model,
    which is not changed. If the layers of the given model are streamed, those of the new one are too: each is cut
    whenever it is read.

    Args:
        compensation: second moments by number of the block, by which the kept part of the row-wise projections is
            corrected; None leaves it unchanged.
    """
    cut = _Cut(model, structure, plan, compensation)
    streamed = is_streamed(model)
    # Streamed layers that are not in use have shapes alone.
    state = replace(cut, compensation=None).state() if streamed else cut.state()
    pruned = cut.empty_model({name: tensor.shape for name, tensor in state.items()})
    pruned.load_state_dict(cut.resident() if streamed else state, strict=not streamed, assign=True)
    pruned.tie_weights()
    pruned.generation_config = model.generation_config
    give_wrapper(pruned, wrapper_of(model))
    if streamed:
        move_resident(pruned, model.device)
        stream_layers(pruned, [partial(cut.read_layer, layer) for layer in range(structure.layers)])
    else:
        # Buffers that are not saved (rotary frequencies) were made on the CPU.
        place_layers(pruned, model.device, layer_devices(model))
    return allow_any_width(pruned.train(model.training))


@dataclass(frozen=True)
class _Cut:
    """A model, the plan by which it is cut, and the compensation."""

    model: PreTrainedModel
    structure: Structure
    plan: PruningPlan
    compensation: Mapping[int, InputMoments] | None

    def __post_init__(self) -> None:
        self.plan.check_fits(self.structure)

    def resident(self) -> dict[str, Tensor]:
        """The tensors outside of layers."""
        prefix = f"{self.structure.architecture.layers}."
        return {name: tensor for name, tensor in self.model.state_dict().items() if not name.startswith(prefix)}

    def state(self) -> dict[str, Tensor]:
        """Every tensor with the indices of the kept groups only, compensated."""
        state = self.resident()
        for number in range(self.structure.layers):
            prefix = f"{self.structure.architecture.layers}.{number}."
            state |= {f"{prefix}{name}": tensor for name, tensor in self.layer(number).items()}
        return state

    def read_layer(self, number: int) -> dict[str, Tensor]:
        """The same of a streamed layer, which is read."""
        with loaded_layer(self.model, number):
            return self.layer(number)

    def layer(self, number: int) -> dict[str, Tensor]:
        """The tensors of a layer, by their names within it, with the indices of the kept groups only, compensated."""
        architecture = self.structure.architecture
        prefix = f"{architecture.layers}.{number}."
        module = decoder_layers(self.model)[number]
        tensors = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
        for index, (block, block_plan) in enumerate(zip(self.structure.blocks, self.plan.blocks, strict=True)):
            if block.layer != number or len(block_plan.kept) == block.groups:
                continue
            if not block_plan.kept:
                part = architecture.attention if block.kind == "heads" else architecture.feed_forward
                path = f"{prefix}{part.module if part else ''}."
                tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(path)}
                continue
            for parameter, slices in block.slices_by_parameter.items():
                if self.compensation is None or not block.is_projected or parameter != block.row_wise.parameter:
                    tensor, axis = tensors[parameter], slices[0].stored_axis
                    by_expert = slices[0].of_experts(tensor)
                    kept = kept_indices(block_plan, slices, by_expert.shape[1 + axis]).to(tensor.device)
                    narrowed = [part.index_select(axis, rows) for part, rows in zip(by_expert, kept, strict=True)]
                    tensors[parameter] = torch.stack(narrowed) if slices[0].experts else narrowed[0]
                    continue
                weights = block.row_wise.as_projections(tensors[parameter])
                kept = kept_indices(block_plan, [block.row_wise], weights.shape[2])
                moments = self.compensation[index].of_experts()
                corrected = [compensate(*expert) for expert in zip(weights, moments, kept, strict=True)]
                tensors[parameter] = block.row_wise.as_stored(torch.stack(corrected))
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    @without_weights()
    def empty_model(self, shapes: Mapping[str, torch.Size]) -> PreTrainedModel:
        """The pruned model before its weights, which have these shapes, are set."""
        model, architecture = self.model, self.structure.architecture
        # Without the differences between pruned layers and without remote code.
        numbers = architecture.config_fields.head_numbers
        fields = {name: value for name, value in stock_fields(model.config).items() if name != numbers}
        if architecture.attention:
            fields["head_dim"] = architecture.head_dim(model.config.per_layer_config[0])
        layers = self.layer_fields()
        common: dict[str, Any] = {}
        for layer_fields in layers.values():
            common |= layer_fields
        # No stock class supports layers without attention.
        if "skip" not in common and all(given.items() <= common.items() for given in layers.values()):
            for stock in _stock_models(model, fields | common):
                if {name: tensor.shape for name, tensor in stock.state_dict().items()} == shapes:
                    wrapper = wrapper_of(model)
                    if wrapper is None or wrapper.fits(stock.config):
                        return stock
        if stock_config := fields.pop("per_layer_config", None):
            fields["stock_per_layer_config"] = stock_config
            stock_layers = fields_by_layer(stock_config)
            layers = {
                index: {**stock_layers.get(index, {}), **layers.get(index, {})}
                for index in range(self.structure.layers)
            }
        fields |= {"per_layer_config": layers}
        if numbers:
            fields |= {numbers: None}
        pruned: PreTrainedModel = architecture.pruned_class(architecture.pruned_class.config_class.from_dict(fields))
        return pruned

    def layer_fields(self) -> dict[int, dict[str, object]]:
        """The config fields of each layer."""
        architecture, config = self.structure.architecture, self.model.config
        layers = dict[int, dict[str, object]]()
        # Attention that was removed before has no block.
        skipped = [layer for layer in range(self.structure.layers) if lacks_attention(config.per_layer_config[layer])]
        for block, block_plan in zip(self.structure.blocks, self.plan.blocks, strict=True):
            fields = layers.setdefault(block.layer, {})
            if not block_plan.kept:
                skipped.append(block.layer)
                continue
            fields |= block.config_fields(len(block_plan.kept))
            numbered = architecture.config_fields.head_numbers
            if numbered and block.kind == "heads":
                before = getattr(config.per_layer_config[block.layer], numbered, None)
                if before or len(block_plan.kept) < block.groups:
                    fields[numbered] = [(before or range(block.groups))[group] for group in block_plan.kept]
        names = architecture.config_fields
        for layer in skipped:
            # Stock classes that do not know `skip` refuse a size in which layers differ; without the count, they would
            # initialise the missing weights at random.
            layers.setdefault(layer, {}).update({"skip": [ATTENTION], names.key_value_heads or names.heads: 1})
        return layers


def _stock_models(model: PreTrainedModel, fields: Mapping[str, object]) -> Iterator[PreTrainedModel]:
    """Models of a config in stock classes that accept it: the class of the family, then an equivalent one whose config
    accepts any number of heads. A multimodal model keeps the class of its decoder."""
    architecture = architecture_of(model.config)
    candidates = [(architecture.model_type, dict(fields))]
    equivalent = None if wrapper_of(model) else architecture.equivalent
    if equivalent and not any(fields.get(field) for field in equivalent.without):
        common = {name: value for name, value in fields.items() if name not in ("model_type", *equivalent.without)}
        candidates.append((equivalent.model_type, common | equivalent.fields))
    for model_type, accepted in candidates:
        stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        # Some families refuse numbers of heads that do not divide the hidden size, in the config or in the model.
        with contextlib.suppress(StrictDataclassError, ValueError):
            yield stock_class(stock_class.config_class.from_dict(accepted))


def compensate(weight: Tensor, moments: InputMoments, kept: Tensor) -> Tensor:
    """The best columns to keep when some inputs of a projection are removed.

    They minimise E‖W x − W' x_K‖² + damping · ‖W' − W_K‖² over W': W' = W_K + W_R S_RK (S_KK + damping · I)⁻¹ with
    S = E[x xᵀ]. Damping is towards the original columns and not towards zero, so the result is never worse on its own
    text than leaving them unchanged.

    Args:
        weight: [outputs, inputs], any dtype.
        moments: of the inputs.
        kept: [kept], int64, the numbers of the kept inputs, ascending.

    Returns:
        [outputs, kept] in the dtype of the weight.
    """
    is_removed = torch.ones(weight.shape[1], dtype=torch.bool)
    is_removed[kept] = False
    removed = is_removed.nonzero().flatten()
    kept, removed = kept.to(weight.device), removed.to(weight.device)
    second = moments.second.to(weight.device)
    within, across = second[kept][:, kept], second[kept][:, removed]
    change = solve_damped(within, moments.damping, across @ weight[:, removed].float().T)
    return (weight[:, kept].float() + change.T).to(weight.dtype)


def kept_indices(plan: BlockPlan, slices: Sequence[TensorSlice], size: int) -> Tensor:
    """[experts, kept], int64, ascending: the kept indices, out of `size`, of the pruned axis of a tensor; one row for
    tensors without experts."""
    experts = slices[0].experts or 1
    is_kept = torch.zeros(plan.groups, dtype=torch.bool)
    is_kept[list(plan.kept)] = True
    mask, by_expert = torch.ones(experts, size, dtype=torch.bool), is_kept.view(experts, -1)
    for part in slices:
        columns = by_expert.repeat_interleave(part.width, 1)
        mask[:, part.offset : part.offset + columns.shape[1]] = columns
    return mask.nonzero()[:, 1].view(experts, -1)
