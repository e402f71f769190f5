"""Adapters of PEFT: LoRA (arXiv 2106.09685) and the scales of IA3 (arXiv 2205.05638)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapruner.config import RecoveryOptions
from adapruner.errors import AdaPrunerError, reason
from adapruner.models._architecture import architecture_of
from adapruner.models._device import computes_bfloat16_natively, copy_in_dtype, in_fastest_dtype
from adapruner.models._layers import change_weight
from adapruner.models._places import quiet_transformers
from adapruner.random_state import random_state_kept


def check_adapters(empty: PreTrainedModel, options: RecoveryOptions) -> None:
    """Refuses a family that adapters cannot be put on; the model without weights cannot be used afterwards."""
    with random_state_kept(), quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_adapters(empty, options)


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or a copy of it in a dtype to train adapters in: not float16, and bfloat16 if that is fast."""
    if model.dtype == torch.float16:
        native = computes_bfloat16_natively(model.device)
        return copy_in_dtype(model, torch.bfloat16 if native else torch.float32)
    return in_fastest_dtype(model)


def with_adapters(model: PreTrainedModel, options: RecoveryOptions) -> Any:
    """Adapters on every linear layer of the decoder layers, in float32: of LoRA, or with IA3 a scale for each input."""
    layers = architecture_of(model.config).layers
    modules = [(name, module) for name, module in model.named_modules() if name.startswith(f"{layers}.")]
    linear = [name for name, module in modules if isinstance(module, nn.Linear | Conv1D)]
    is_transposed = any(isinstance(module, Conv1D) for _, module in modules)
    settings: Any = {"target_modules": linear, "fan_in_fan_out": is_transposed, "task_type": "CAUSAL_LM"}
    config: PeftConfig
    if options.train == "ia3":
        # PEFT scales the inputs of the modules that it calls feed-forward, and the outputs of others.
        config = IA3Config(feedforward_modules=linear, **settings)
    else:
        settings |= {"lora_alpha": options.lora_alpha, "lora_dropout": options.lora_dropout}
        config = LoraConfig(r=options.lora_rank, **settings)
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise AdaPrunerError(
            f"PEFT cannot put adapters on a {model.config.model_type} ({reason(error)}): set `train` to full"
        ) from error
    # PEFT would load saved adapters onto the first GPU, wherever the model is.
    adapted.load_adapter = partial(adapted.load_adapter, torch_device=str(model.device))
    return adapted


def take_off(adapted: Any) -> dict[str, Any]:
    """Removes adapters from the model below; returns them by the path of their layer."""
    adapters = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer | IA3Layer)
    }
    adapted.unload()
    return adapters


def merge(adapters: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Merges adapters into the weights of a model in float32, one at a time: the changes of all weights together are
    twice as large as a model in bfloat16."""

    def merged(adapter: Any, is_transposed: bool, weight: Tensor) -> Any:
        if isinstance(adapter, IA3Layer):
            scales = adapter.ia3_l["default"].to(weight.device)  # [1, inputs]
            return weight.float() * (scales.T if is_transposed else scales)
        return adapter.get_delta_weight("default").to(weight.device).float().add_(weight)

    with torch.no_grad():
        for name, adapter in adapters.items():
            is_transposed = isinstance(model.get_submodule(name), Conv1D)
            change_weight(model, f"{name}.weight", partial(merged, adapter, is_transposed))
