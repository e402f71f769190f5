"""Tiny configs of any family of transformers, from one table of sizes under whatever names a family has for them; and
plans that remove groups at random."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adapruner.budget.plan import PruningPlan, make_plan
from adapruner.structure.blocks import Block, Structure
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model

SIZES: dict[str, int] = {
    "vocab_size": 256,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "rotary_dim", "global_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    "shared_intermediate_size": 32,
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 24),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    "sliding_window": 8,
    "first_k_dense_replace": 1,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_value_head_dim", "linear_key_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "n_groups"), 4),
    "mamba_d_ssm": 128,
    **dict.fromkeys(("vocab_size_per_layer_input", "unpadded_vocab_size"), 256),
    "hidden_size_per_layer_input": 16,
}
# What a family needs beside sizes: a layer of every kind, as released models of it have them, or heads that each have
# their own keys and values.
OWN: dict[str, dict[str, object]] = {
    "axk1": {"num_key_value_heads": 4},
    "axk2": {"num_key_value_heads": 4},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "num_heads": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "minicpm3": {"num_key_value_heads": 4},
    "sarvam_mla": {"num_key_value_heads": 4},
    "youtu": {"num_key_value_heads": 4},
}


def tiny_config(model_type: str, **changes: object) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    names = set(config_class().to_dict()) | set(getattr(config_class, "attribute_map", {}))
    fields = {name: size for name, size in SIZES.items() if name in names}
    for alias, name in getattr(config_class, "attribute_map", {}).items():
        if name in fields:
            fields.pop(alias, None)
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return config_class(**fields | OWN.get(model_type, {}) | changes)


def random_plan(structure: Structure, counts: Sequence[int]) -> PruningPlan:
    """Each block keeps so many groups, whichever."""
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    return make_plan(structure, scores, counts)


def cut_to(
    dense: PreTrainedModel, kept: Callable[[Block], int] = lambda block: max(1, block.groups - block.layer)
) -> PreTrainedModel:
    """The model of whose blocks so many groups are kept, whichever; by default fewer in every layer."""
    structure = build_structure(dense)
    return prune_model(dense, structure, random_plan(structure, [kept(block) for block in structure.blocks]))


def decoder_families() -> list[str]:
    """The families of the installed transformers that generate text with a decoder and build tiny."""
    return [name for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if name not in OTHERS and builds(name)]


# Encoders that are used as decoders, and parts of models for other things than text.
OTHERS = {
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta"),
    *("xlm-roberta-xl", "xlnet", "xmod", "trocr", "moshi", "reformer", "git", "cpmant"),
    # State space models and the like, without attention or feed-forward.
    *("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"),
}


def builds(model_type: str) -> bool:
    with contextlib.suppress(Exception):
        config = tiny_config(model_type)
        if not config.is_encoder_decoder and hasattr(config, "num_hidden_layers"):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            return sum(parameter.numel() for parameter in model.parameters()) < 20_000_000
    return False
