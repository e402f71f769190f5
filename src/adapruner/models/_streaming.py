"""A model whose layers stay in its files: one layer at a time is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from adapruner.models import modeling_pruned
from adapruner.models._architecture import architecture_of
from adapruner.models._layers import ReadLayer, decoder_layers, plain_weights, stream_layers
from adapruner.models._stored import StoredTensor, differences, names_in_files, stored_tensors


def load_streamed(
    path: str, config: PreTrainedConfig, dtype: torch.dtype | None, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a folder or hub id whose weights are in safetensors files, with only what is not in a decoder layer
    in memory. On a CPU, weights are read where they lie in the files, without a copy, unless `dtype` is another.

    Args:
        dtype: of the weights; None keeps that of the files.

    Returns:
        The model, and what does not fit in the form in which `from_pretrained` reports it.

    Raises:
        AdaPrunerError: see `stored_tensors` and `differences`.
    """
    files = stored_tensors(path)
    with init_empty_weights(include_buffers=False):
        pruned_class: Any = modeling_pruned.PRUNED_CLASSES[config.model_type]
        model: Any = pruned_class(config) if config.is_heterogeneous else AutoModelForCausalLM.from_config(config)
    stored = names_in_files(model, files)
    layers_prefix = f"{architecture_of(config).layers}."
    resident = {name: own for name, own in stored.items() if not name.startswith(layers_prefix)}
    report = differences(model, stored, files)
    if not report["mismatched_keys"]:
        model.load_state_dict(_reader(resident, files, device, dtype)(), strict=False, assign=True)
        model.tie_weights()
        report["missing_keys"] = sorted(
            name for name, tensor in model.state_dict().items() if name not in stored and tensor.is_meta
        )
    if not report["missing_keys"] and not report["mismatched_keys"]:
        readers = []
        for index in range(len(decoder_layers(model))):
            prefix = f"{layers_prefix}{index}."
            own = {name.removeprefix(prefix): key for name, key in stored.items() if name.startswith(prefix)}
            readers.append(_reader(own, files, device, dtype))
        stream_layers(model, readers)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)
        if cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False):
            model.generation_config = GenerationConfig.from_pretrained(path)
    return model, report


def _reader(
    names: Mapping[str, str], files: Mapping[str, StoredTensor], device: torch.device, dtype: torch.dtype | None
) -> ReadLayer:
    """Reads tensors by their names in the model, given those in the files."""

    def read() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in {files[own].file for own in names.values()}:
            with safe_open(file, "pt") as opened:
                tensors |= {name: opened.get_tensor(own) for name, own in names.items() if files[own].file == file}
        return plain_weights(tensors, device, dtype)

    return read
