"""The shapes of all tensors of a pruned model, from those of the dense one: arithmetic, no model is built."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from adapruner.models import architecture_of
from adapruner.structure import Structure

Shape = tuple[int, ...]


def stored_shapes(model: PreTrainedModel) -> dict[str, Shape]:
    """The shapes of the tensors that a checkpoint of a model holds, by name, tied ones once."""
    buffers = dict(model.named_buffers())
    stored = dict(model.named_parameters()) | {
        name: tensor for name, tensor in model.state_dict().items() if name in buffers
    }
    return {name: tuple(tensor.shape) for name, tensor in stored.items()}


def shapes_after(model: PreTrainedModel, structure: Structure, counts: Sequence[int]) -> dict[str, Shape]:
    """The shapes of a pruned model by name, its layers numbered anew.

    Args:
        model: the dense model; on the meta device is enough.
        counts: how many groups each block keeps, in the order of `structure.blocks`.
    """
    architecture, shapes = architecture_of(model.config), stored_shapes(model)
    gone = [f"{architecture.layers}.{layer}." for layer in structure.removed_layers(counts)]
    for block, count in zip(structure.blocks, counts, strict=True):
        if not count and (module := architecture.module_of(block.kind)):
            gone.append(f"{architecture.layers}.{block.layer}.{module}.")
        for part in block.slices:
            shape, axis = list(shapes[part.parameter]), part.stored_axis + bool(part.experts)
            shape[axis] -= (block.groups - count) // (part.experts or 1) * part.width
            shapes[part.parameter] = tuple(shape)
    kept = [layer for layer in range(structure.layers) if layer not in structure.removed_layers(counts)]
    numbers = {f"{architecture.layers}.{old}.": f"{architecture.layers}.{new}." for new, old in enumerate(kept)}
    return {_renamed(name, numbers): shape for name, shape in shapes.items() if not name.startswith(tuple(gone))}


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(prefix, "") + name.removeprefix(prefix)
