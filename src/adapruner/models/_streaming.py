"""A model whose layers stay in its files: one layer at a time is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from adapruner.errors import AdaPrunerError
from adapruner.models import modeling_pruned
from adapruner.models._architecture import architecture_of
from adapruner.models._layers import ReadLayer, decoder_layers, plain_weights, stream_layers

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


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
        AdaPrunerError: there are no safetensors files.
    """
    files = _files_of_tensors(path)
    with init_empty_weights(include_buffers=False):
        pruned_class: Any = modeling_pruned.PRUNED_CLASSES[config.model_type]
        model: Any = pruned_class(config) if config.is_heterogeneous else AutoModelForCausalLM.from_config(config)
    own_names = model.state_dict()
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    # Families are stored under older names, or without the prefix of the model inside the causal language model.
    stored = {
        name: key
        for key in files
        if (name := rename_source_key(key, renamings, [], model.base_model_prefix, own_names)[0]) in own_names
    }
    layers_prefix = f"{architecture_of(config).layers}."
    resident = {name: own for name, own in stored.items() if not name.startswith(layers_prefix)}
    report = _report(model, stored, files)
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


def _files_of_tensors(path: str) -> dict[str, str]:
    """The file that each stored tensor is in."""
    index = cached_file(path, _INDEX, _raise_exceptions_for_missing_entries=False)
    weights = cached_file(path, _WEIGHTS, _raise_exceptions_for_missing_entries=False)
    paths = get_checkpoint_shard_files(path, index)[0] if index else [weights]
    if not index and weights is None:
        raise AdaPrunerError(
            f"--layer-wise reads layers out of safetensors files, and {Path(path).name} has none: save it as such first"
        )
    files: dict[str, str] = {}
    for file in paths:
        with safe_open(file, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    return files


def _report(model: PreTrainedModel, stored: dict[str, str], files: dict[str, str]) -> dict[str, Any]:
    mismatched = []
    for name, tensor in model.state_dict().items():
        if name in stored:
            with safe_open(files[stored[name]], "pt") as opened:
                shape = tuple(opened.get_slice(stored[name]).get_shape())
            if shape != tuple(tensor.shape):
                mismatched.append((name, shape, tuple(tensor.shape)))
    unexpected = sorted(files.keys() - set(stored.values()))
    return {"mismatched_keys": mismatched, "missing_keys": [], "unexpected_keys": unexpected}


def _reader(names: dict[str, str], files: dict[str, str], device: torch.device, dtype: torch.dtype | None) -> ReadLayer:
    """Reads tensors by their names in the model, given those in the files."""

    def read() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in {files[own] for own in names.values()}:
            with safe_open(file, "pt") as opened:
                tensors |= {name: opened.get_tensor(own) for name, own in names.items() if files[own] == file}
        return plain_weights(tensors, device, dtype)

    return read
