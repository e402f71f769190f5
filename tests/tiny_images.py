"""Inputs with an image for tiny multimodal models of any family: the first of a few kinds that a model runs with."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adapruner.base.errors import reason
from adapruner.budget.plan import PruningPlan
from adapruner.families.proof import masked
from adapruner.model.wrapper import wrapper_of
from adapruner.structure.blocks import Structure
from tiny_wrappers import IMAGE_TOKEN, TOWER, VISION_START

_SIDE, _PATCHES = TOWER["image_size"], TOWER["image_size"] // TOWER["patch_size"]
_ROW = torch.arange(_PATCHES)
# Arguments besides the pixels, by name: an image of 4 by 4 patches.
_ARGUMENTS: dict[str, Tensor] = {
    "image_grid_thw": torch.tensor([[1, _PATCHES, _PATCHES]]),
    **dict.fromkeys(("image_grid_hw", "target_sizes", "spatial_shapes"), torch.tensor([[_PATCHES, _PATCHES]])),
    "image_merge_sizes": torch.tensor([2]),
    "image_position_ids": torch.cartesian_prod(_ROW, _ROW)[None],
    "high_res_pixel_values": torch.linspace(-1, 1, 3 * _SIDE**2).view(1, 3, _SIDE, _SIDE),
    "image_token_pooling": torch.arange(_PATCHES**2).view(-1, 4),
    "image_grids": torch.tensor([[2, 1, 2, 1]]),
    "image_num_crops": torch.tensor([1]),
}
# Some models need the size of the image, and others pass it to a tower that does not know it.
_SIZE = torch.tensor([[_SIDE, _SIDE]])


def with_image(model: Any) -> dict[str, Tensor]:
    """Inputs for a prompt with an image, which the logits of the model depend on.

    Raises:
        ValueError: the model cannot be run with any of the kinds of inputs; with the reasons.
    """
    refusals = dict[str, None]()
    for images in _kinds(model):
        try:
            with torch.no_grad():
                inputs = _with_prompt(model, images)
                others = inputs | {"pixel_values": inputs["pixel_values"].flip(-1) * 3}
                logits, of_others = (model(**arguments).logits for arguments in (inputs, others))
        except Exception as error:  # anything that a model class raises over inputs for which it was not made
            refusals[reason(error)] = None
            continue
        if logits.isfinite().all() and not torch.allclose(logits, of_others, rtol=1e-3, atol=1e-3):
            return inputs
        refusals["the logits do not depend on the image"] = None
    raise ValueError("; ".join(refusals))


def masked_logits(
    decoder: Any, structure: Structure, plan: PruningPlan, dense: Any, inputs: dict[str, Tensor]
) -> Tensor:
    """The logits of a dense multimodal model, whose decoder does not read the groups that a plan removes."""
    wrapper = wrapper_of(decoder)
    with masked(decoder, structure, plan) as silenced, torch.no_grad():
        state = silenced.state_dict()
        names = wrapper.names(silenced, dense) if wrapper else {name: name for name in state}
        dense.load_state_dict({outer: state[name] for name, outer in names.items()}, strict=False, assign=True)
        logits: Tensor = dense(**inputs).logits
    return logits


def _kinds(model: Any) -> Iterator[dict[str, Tensor]]:
    """Images as arguments of a model, but the tokens: pixels in all shapes that families have for them."""
    names, patch = inspect.signature(model.forward).parameters, TOWER["patch_size"]
    fixed = {name: values for name, values in _ARGUMENTS.items() if name in names}
    count, width, generator = _PATCHES**2, 3 * patch**2, torch.Generator().manual_seed(5)
    # In some, patches have two frames, or four of them are a square.
    patches = [
        *((count, width), (count, 2 * width), (1, count, width), (1, 3, patch, count * patch)),
        *((count, 3, patch, patch), (1, count, 4 * width), (count, 2 * patch, 2 * patch, 3)),
    ]
    # An image, the images of a prompt, and an image with a crop.
    squares = [(1, 3, _SIDE, _SIDE), (1, 1, 3, _SIDE, _SIDE), (1, 2, 3, _SIDE, _SIDE)]
    for shape in patches + squares if fixed else squares + patches:
        pixels = torch.randn(shape, generator=generator).to(model.dtype)
        masks = (torch.ones((*shape[:2], *shape[3:])).long(), torch.ones(shape[:2], dtype=torch.bool))
        for others in ({}, {"image_sizes": _SIZE}, *({"pixel_attention_mask": mask} for mask in masks)):
            if others.keys() <= names.keys():
                yield {"pixel_values": pixels} | fixed | others


def _with_prompt(model: Any, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a model for a prompt with images: one token for every row of features that the tower returns."""
    inner = getattr(model, "model", model)
    around = inner if hasattr(inner, "get_image_features") else model
    known = inspect.signature(around.get_image_features).parameters
    arguments = {name: value for name, value in images.items() if name in known or "args" in known}
    outputs = around.get_image_features(**arguments, return_dict=True)
    of_layers = outputs.get("deepstack_features") or [(0, outputs.get("last_hidden_state"))]
    features = of_layers[0][1] if outputs.get("pooler_output") is None else outputs.pooler_output
    rows = sum(
        len(feature.flatten(0, -2)) for feature in (features if isinstance(features, list | tuple) else [features])
    )
    tokens = torch.tensor([[5, 9, VISION_START, *[IMAGE_TOKEN] * rows, 202, 11, 12, 7]])
    types = (tokens == IMAGE_TOKEN).long()
    by_name = {"mm_token_type_ids": types, "token_type_ids": types}
    names = inspect.signature(model.forward).parameters
    return (
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        | {name: values for name, values in by_name.items() if name in names}
        | images
    )
