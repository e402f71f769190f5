"""A model whose layers stay in its files: one layer at a time is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from adapruner.models import modeling_pruned
from adapruner.models._architecture import architecture_of
from adapruner.models._layers import ReadLayer, decoder_layers, plain_weights, stream_layers
from adapruner.models._stored import StoredTensor, names_in_files, read_tensors


def load_streamed(
    path: str, config: PreTrainedConfig, files: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model of a folder or hub id whose weights are in safetensors files, with only what is not in a decoder layer
    in memory. On a CPU, weights are read where they lie in the files, without a copy, unless `dtype` is another.

    Args:
        files: what they hold, which is the model of the config (see `differences`).
        dtype: of the weights.
    """
    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        pruned_class: Any = modeling_pruned.PRUNED_CLASSES[config.model_type]
        model: Any = pruned_class(config) if config.is_heterogeneous else AutoModelForCausalLM.from_config(config)
    names = names_in_files(model, files)
    layers_prefix = f"{architecture_of(config).layers}."

    def reader(own: Mapping[str, str]) -> ReadLayer:
        return lambda: plain_weights(read_tensors(own, files), device, dtype)

    def below(prefix: str) -> dict[str, str]:
        return {name.removeprefix(prefix): key for name, key in names.items() if name.startswith(prefix)}

    resident = reader({name: key for name, key in names.items() if not name.startswith(layers_prefix)})
    model.load_state_dict(resident(), strict=False, assign=True)
    model.tie_weights(missing_keys=model.state_dict().keys() - names.keys(), recompute_mapping=False)
    count = len(decoder_layers(model))
    stream_layers(model, [reader(below(f"{layers_prefix}{index}.")) for index in range(count)])
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)
    if cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False):
        model.generation_config = GenerationConfig.from_pretrained(path)
    streamed: PreTrainedModel = model.eval()
    return streamed
