"""Tiny models of a family, whose structure can be read off in seconds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from adapruner.models._architecture import fields_by_layer

# Configs below these sizes are used unchanged.
_MOST_PARAMETERS, _MOST_LAYERS = 10_000_000, 8
_LAYERS, _HEADS, _KEY_VALUE_HEADS, _WIDTH, _EXPERTS = 4, 4, 2, 16, 4
# Config fields for the experts per token, the groups of experts, and the number of groups that are chosen first.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
EXPERT_GROUPS, CHOSEN_GROUPS = ("n_group", "num_expert_group"), ("topk_group",)
# By config fields. Heads fill the hidden size, as some families require.
_SIZES: dict[str, int] = {
    name: size
    for names, size in {
        "hidden_size n_embd d_model lru_width word_embed_proj_dim": _HEADS * _WIDTH,
        "num_hidden_layers n_layer n_layers num_layers": _LAYERS,
        "num_attention_heads n_head n_heads": _HEADS,
        "num_key_value_heads num_global_key_value_heads swa_num_key_value_heads num_kv_heads": _KEY_VALUE_HEADS,
        "head_dim kv_channels v_head_dim swa_head_dim rotary_dim qk_rope_head_dim qk_nope_head_dim": _WIDTH,
        "global_head_dim": 2 * _WIDTH,
        "intermediate_size ffn_dim n_inner ffn_hidden_size": 96,
        "moe_intermediate_size expert_ffn_hidden_size": 48,
        "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size": 32,
        "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts": _EXPERTS,
        " ".join(TOP_K): 2,
        " ".join((*EXPERT_GROUPS, *CHOSEN_GROUPS)): 1,
        "kv_lora_rank q_lora_rank": 24,
        "mamba_n_heads mamba_num_heads linear_num_value_heads": 8,
        "mamba_d_head mamba_head_dim linear_value_head_dim linear_key_head_dim": 16,
        "mamba_d_state ssm_state_size mamba_dt_rank mamba_chunk_size chunk_size": 16,
        "linear_num_key_heads mamba_n_groups mamba_ngroups n_groups": 4,
        "mamba_d_ssm max_position_embeddings n_positions": 128,
        "attn_layer_period expand mamba_expand num_kv_shared_layers": 2,
        "attn_layer_offset first_k_dense_replace moe_layer_start_index": 1,
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size": 256,
        "hidden_size_per_layer_input": 16,
        "sliding_window": 8,
    }.items()
    for name in names.split()
}
_LEFT_OUT = ("transformers_version", "model_type", "architectures", "dtype", "allow_global_per_layer_attribute_access")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same class as that of a stock model, with the same options, for a model of a few hundred thousand
    parameters; the config of a small model is copied.

    Raises:
        Exception: the config class refuses the sizes.
    """
    config = copy.deepcopy(config)
    if config.num_hidden_layers <= _MOST_LAYERS and parameters_of(config) <= _MOST_PARAMETERS:
        return config
    config.allow_global_per_layer_attribute_access = True
    heads, key_value_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    fields = {
        name: _shrunk(name, value, config.num_hidden_layers)
        for name, value in config.to_dict().items()
        if name not in _LEFT_OUT
    }
    types: list[Any] = list(getattr(config, "layer_types", None) or [None] * config.num_hidden_layers)
    if per_layer := fields.get("per_layer_config"):
        fields["per_layer_config"] = _shrunk_layers(per_layer, types, _sampled(types))
    fields |= {name: number for number, name in enumerate(_TOKENS) if fields.get(name) is not None}
    if heads == key_value_heads and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = _HEADS
    # The heads of a state-space mixer times their width must equal its width.
    if fields.get("mamba_n_heads") and not fields.get("mamba_d_ssm"):
        fields["mamba_d_head"] = fields["mamba_expand"] * fields["hidden_size"] // fields["mamba_n_heads"]
    tiny = type(config)(**fields)
    if per_layer and getattr(tiny, "layer_types", None):
        # Gemma 4 changes the type of its last layer.
        shrunk: Any = _shrunk_layers(per_layer, types, tiny.layer_types)
        tiny.per_layer_config = shrunk
    return tiny


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a config with random weights, all of which affect the output; float32, always the same."""
    config = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1)
            parameter.requires_grad_()
        # Large, so that the epsilon of norms is negligible.
        cast(nn.Embedding, model.get_input_embeddings()).weight.data *= 10
    return model


def parameters_of(config: PreTrainedConfig) -> int:
    """Number of parameters of the stock model of a config."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def _shrunk_layers(
    per_layer: Mapping[Any, Mapping[str, Any]], types: list[Any], tiny_types: list[Any]
) -> dict[int, dict[str, Any]]:
    """The fields that a tiny config, with layers of `tiny_types`, sets for single layers: the fields of the first layer
    of the same type."""
    by_layer, shrunk = fields_by_layer(per_layer), dict[int, dict[str, Any]]()
    for layer, layer_type in enumerate(tiny_types):
        if fields := by_layer.get(types.index(layer_type)):
            shrunk[layer] = {name: _shrunk(name, value, 0) for name, value in fields.items()}
    return shrunk


def _shrunk(name: str, value: Any, layers: int) -> Any:
    """The value of a config field in a tiny model; lists with an entry for each of so many layers are sampled."""
    if name == "attn_layer_indices" and value:
        return [1, 3]
    if isinstance(value, list | tuple) and len(value) == layers:
        return [_shrunk(name, entry, 0) for entry in _sampled(list(value))]
    if isinstance(value, Mapping) and name == "rope_parameters":
        if any(isinstance(parameters, Mapping) for parameters in value.values()):
            return {kind: _shrunk(name, parameters, layers) for kind, parameters in value.items()}
        plain = {
            key: value[key] for key in value if key in ("rope_theta", "partial_rotary_factor", "mrope_interleaved")
        }
        if "mrope_section" in value:
            half = int(_WIDTH * value.get("partial_rotary_factor", 1)) // 2
            plain["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]
        return plain | {"rope_type": value["rope_type"] if value.get("rope_type") == "proportional" else "default"}
    is_size = isinstance(value, int) and not isinstance(value, bool)
    if not is_size or name not in _SIZES:
        return value
    # Sizes of state-space mixers depend on each other.
    return _SIZES[name] if name.startswith("mamba_") and value else min(value, _SIZES[name])


def _sampled(entries: list[Any]) -> list[Any]:
    """The entries of a tiny model's layers: every distinct entry, in order, then the first ones again."""
    distinct = [entry for index, entry in enumerate(entries) if entry not in entries[:index]]
    return (distinct + entries)[:_LAYERS]
