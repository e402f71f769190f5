"""The device of a model, and the dtype in which it runs fastest there."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adapruner.base.errors import AdaPrunerError, reason
from adapruner.base.processes import this_process
from adapruner.model.layers import ReadLayer, decoder_layers, is_streamed, stream_layers
from adapruner.model.stored import deferred_by_module, placeholder


def resolve_device(device: str) -> torch.device:
    """The device of this name. `auto` is the accelerator that PyTorch finds, a different one for each process of
    torchrun, or else the CPU. An accelerator becomes the current device, which libraries use by default.

    Raises:
        AdaPrunerError: there is no such device, or it lacks a needed operation.
    """
    if device.startswith("mps"):
        raise AdaPrunerError(f"`device` {device}: some sums are in float64, which MPS does not support; use cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise AdaPrunerError(f"`device` {device}: PyTorch finds no CUDA GPU here; use cpu")
    process = this_process()
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    accelerator = current.type if current and current.type != "mps" else None
    if device == "auto" and accelerator is None:
        return torch.device("cpu")
    if accelerator and (device == "auto" or (device == accelerator and process.count_here > 1)):
        device = f"{accelerator}:{process.rank_here}"
    try:
        resolved = torch.empty(0, device=device).device
    except (RuntimeError, ImportError) as error:
        raise AdaPrunerError(f"`device` {device}: {reason(error)}") from None
    if resolved.type == "meta":
        raise AdaPrunerError("`device` meta computes nothing")
    if resolved.type == accelerator:
        torch.get_device_module(resolved).set_device(resolved)
    return resolved


def resolve_devices(device: str) -> tuple[torch.device, ...]:
    """The device of a model, or the devices over which its layers are spread, separated by commas: `cuda:0,cuda:1`. The
    first becomes the current device.

    Raises:
        AdaPrunerError: there is no such device, or it lacks a needed operation; or several processes are given several
            devices.
    """
    names = [name.strip() for name in device.split(",")]
    devices = [resolve_device(name) for name in reversed(names)][::-1]
    # A name without a number is the current device, which resolving other names changes.
    are_numbered = all(":" in name for name in names)
    types = {resolved.type for resolved in devices}
    if len(devices) > 1 and (not are_numbered or len(set(devices)) < len(devices) or len(types) > 1):
        raise AdaPrunerError(f"`device` {device}: name different devices of one type, each with its number")
    if len(devices) > 1 and this_process().count > 1:
        raise AdaPrunerError(f"`device` {device}: each of several processes has a GPU of its own; leave `device` out")
    return tuple(devices)


def usable_devices(device: str) -> tuple[torch.device, ...]:
    """The devices over which layers may be spread: the named ones (see `resolve_devices`); with `auto`, all devices of
    this process."""
    named = resolve_devices(device)
    if device != "auto" or named[0].type == "cpu" or this_process().count > 1:
        return named
    return tuple(torch.device(named[0].type, index) for index in range(torch.accelerator.device_count()))


@contextlib.contextmanager
def computing_repeatably(device: torch.device) -> Iterator[None]:
    """While it lasts, an accelerator multiplies float32 in full precision, without TF32, and uses deterministic kernels
    if PyTorch has them. A CPU does so anyway."""
    if device.type == "cpu":
        yield
        return
    settings: Any = torch.utils.deterministic
    cudnn: Any = torch.backends.cudnn
    is_strict = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    # Read by cuBLAS on first use: without it, sums may differ between streams.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with contextlib.ExitStack() as restoring, warnings.catch_warnings():
        restoring.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        restoring.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        restoring.callback(torch.use_deterministic_algorithms, is_strict, warn_only=only_warns)
        restoring.callback(setattr, settings, "fill_uninitialized_memory", settings.fill_uninitialized_memory)
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False
        warnings.filterwarnings("ignore", message=".*(deterministic|CUBLAS_WORKSPACE_CONFIG)")
        yield


def describe_device(device: torch.device) -> str:
    """Type of the device and, for an accelerator, its name."""
    name: Any = getattr(torch.get_device_module(device), "get_device_name", None)
    return f"{device.type} ({name(device)})" if name else device.type


def computes_bfloat16_natively(device: torch.device) -> bool:
    """True if the device multiplies bfloat16 faster than float32; assumed for GPUs that are not installed."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    is_supported: Any = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return bool(is_supported and is_supported())


def trial_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of trials for weights of a dtype: bfloat16 instead of float32 if the device multiplies it natively (about
    three times as fast on a CPU with AVX-512 bfloat16), and float32 instead of bfloat16 on a CPU that does not (about
    seven times as fast).

    Trials are only compared with each other; plans are applied to the original weights.
    """
    if computes_bfloat16_natively(device):
        return torch.bfloat16 if dtype == torch.float32 else dtype
    return torch.float32 if dtype == torch.bfloat16 and device.type == "cpu" else dtype


def in_fastest_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a copy in the dtype of trials (see `trial_dtype`)."""
    dtype = trial_dtype(model.dtype, model.device)
    return model if dtype == model.dtype else copy_in_dtype(model, dtype)


def copy_in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with parameters of another dtype; the frequencies of rotary embeddings keep their precision. Streamed
    layers are read from the same files and converted each time, deferred weights when they are read."""
    # For deepcopy these are copied already: there is never a second copy in the first dtype.
    deferred = deferred_by_module(model)
    known: dict[int, Any] = {id(sources): sources for sources in deferred.values()}
    for parameter in model.parameters():
        if deferred:
            known[id(parameter)] = placeholder(parameter, parameter.device, dtype)
        else:
            known[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
    layers: list[Any] = list(decoder_layers(model)) if is_streamed(model) else []
    copied = copy.deepcopy(model, known | {id(layer.stream): layer.stream for layer in layers})
    if layers:
        stream_layers(copied, [_in_dtype(layer.stream.read, dict(layer.named_parameters()), dtype) for layer in layers])
    return copied


def _in_dtype(read: ReadLayer, parameters: Container[str], dtype: torch.dtype) -> ReadLayer:
    return lambda: {name: value.to(dtype) if name in parameters else value for name, value in read().items()}
