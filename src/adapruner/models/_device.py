"""Where a model runs, and in which dtype it runs fastest there."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from adapruner.errors import AdaPrunerError, reason
from adapruner.models._layers import is_streamed
from adapruner.processes import this_process


def resolve_device(device: str) -> torch.device:
    """`auto` becomes a GPU where there is one, another for each process that was started together; else the CPU.

    Raises:
        AdaPrunerError: there is no such device, or it cannot compute what is needed.
    """
    if device.startswith("mps"):
        raise AdaPrunerError(
            f"`device` {device}: statistics are summed in float64, which MPS does not support; use cpu"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise AdaPrunerError(f"`device` {device}: PyTorch finds no CUDA GPU here; use cpu")
    process = this_process()
    if device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if device == "auto" or (device == "cuda" and process.count_here > 1):
        device = f"cuda:{process.rank_here}"
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, ImportError) as error:
        raise AdaPrunerError(f"`device` {device}: {reason(error)}") from None
    if found.type == "meta":
        raise AdaPrunerError("`device` meta computes nothing")
    return found


def computes_bfloat16_natively(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32; a GPU that is not here is taken for one that does."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    is_here = torch.cuda.is_available()
    return device.type == "cuda" and (not is_here or torch.cuda.is_bf16_supported(including_emulation=False))


def in_fastest_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a bfloat16 copy where the processor multiplies that natively
    (about three times as fast on a CPU with AVX-512 bfloat16).

    Trials only have to be told apart; plans are cut out of the original weights.
    """
    if model.dtype != torch.float32 or is_streamed(model) or not computes_bfloat16_natively(model.device):
        return model
    return copy_in_dtype(model, torch.bfloat16)


def copy_in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with parameters of another dtype; the frequencies of rotary embeddings stay as exact as in the model."""
    # Named to deepcopy as copied already: there is never a second copy in the first dtype.
    copied = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, copied)
