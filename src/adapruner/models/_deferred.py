"""Models whose weights stay in their files until each of several processes reads its part of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_ATTRIBUTE = "deferred"


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a safetensors file, of which parts can be read."""

    file: str
    name: str

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        with safe_open(self.file, "pt") as opened:
            weight: Tensor = opened.get_slice(self.name)[part]
        return weight


Source = StoredWeight | Tensor


def defer(model: nn.Module, sources: Mapping[str, Source], device: torch.device, dtype: torch.dtype | None) -> None:
    """Replaces parameters by placeholders, which have a shape, a dtype and a device, but no memory of their own. Tied
    parameters stay tied.

    Args:
        sources: of the values, by the paths of the parameters.
        dtype: of the placeholders; None keeps that of each parameter.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_identity = {
        id(parameters[path]): (source, placeholder(parameters[path], device, dtype)) for path, source in sources.items()
    }
    for module in model.modules():
        for name, weight in module._parameters.items():
            if id(weight) in by_identity:
                vars(module).setdefault(_ATTRIBUTE, {})[name], module._parameters[name] = by_identity[id(weight)]


def placeholder(weight: nn.Parameter, device: torch.device, dtype: torch.dtype | None) -> nn.Parameter:
    """A parameter of one number in memory."""
    number = torch.zeros((), dtype=dtype or weight.dtype, device=device)
    return nn.Parameter(number.expand(weight.shape), weight.requires_grad)


def deferred_by_module(model: nn.Module) -> dict[nn.Module, dict[str, Source]]:
    """The sources of parameters that are placeholders, by their names in each module; empty for other models."""
    return {module: vars(module)[_ATTRIBUTE] for module in model.modules() if _ATTRIBUTE in vars(module)}


def read_parts(model: nn.Module, others: Mapping[str, Tensor], device: torch.device) -> None:
    """Gives a model that was sharded on the meta device its weights: every process reads only its part. `others` has
    the values of everything that is not deferred, by the names in the state of the model."""
    state = {}
    for path, weight in model.state_dict().items():
        parent, _, name = path.rpartition(".")
        source = vars(model.get_submodule(parent)).get(_ATTRIBUTE, {}).get(name, others.get(path))
        if not isinstance(weight, DTensor):
            state[path] = source.to(device)
            continue
        layout: Any = weight.device_mesh, weight.placements
        shape, start = compute_local_shape_and_global_offset(weight.shape, *layout)
        local = torch.empty(shape, dtype=weight.dtype, device=device)
        if local.numel():
            local.copy_(source[tuple(slice(begin, begin + size) for begin, size in zip(start, shape, strict=True))])
        state[path] = DTensor.from_local(local, *layout, run_check=False, shape=weight.shape, stride=weight.stride())
    model.load_state_dict(state, assign=True)
    for module in deferred_by_module(model):
        del vars(module)[_ATTRIBUTE]


def read_all(model: nn.Module) -> None:
    """Reads the weights of a model whose weights are deferred, onto the CPU."""
    weights: dict[int, nn.Parameter] = {}
    placeholders = list(model.parameters())
    for module, sources in deferred_by_module(model).items():
        for name, source in sources.items():
            weight: Any = module._parameters[name]
            if id(weight) not in weights:
                values = source[tuple(slice(0, size) for size in weight.shape)].to(weight.dtype)
                weights[id(weight)] = nn.Parameter(values, weight.requires_grad)
            module._parameters[name] = weights[id(weight)]
        del vars(module)[_ATTRIBUTE]
    del placeholders  # until now, or another parameter could have the identity of one of them
