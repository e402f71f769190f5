"""A model whose layers stay in its files: one layer at a time is in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import init_empty_weights
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from adapruner.models._architecture import architecture_of, new_model
from adapruner.models._layers import ReadLayer, decoder_layers, move_resident, plain_weights, stream_layers
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
        model = new_model(config)
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
    move_resident(model, device)
    if cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False):
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.eval()
    return model
