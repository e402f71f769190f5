"""Tiny multimodal models of any family."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel

from tiny_families import OWN, SIZES

TEXT: dict[str, Any] = SIZES | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Towers are narrow and shallow, for images of 16 by 16 pixels in patches of 4 by 4.
TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "encoder_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "num_key_value_heads"), 4),
    "head_dim": 8,
    "image_size": 16,
    "patch_size": 4,
    "vocab_size": 256,
    "out_hidden_size": 64,
    "max_position_embeddings": 64,
    "num_position_embeddings": 16,
    "codebook_dim": 32,
    "codebook_size": 32,
    "latent_channels": 32,
    "downsample_channels": 32,
    "text_hidden_size": 64,
    "base_channels": 32,
    "projection_dim": 64,
    "mm_embed_dim": 64,
    "output_proj_dims": 64,
    "pooling_kernel_size": 2,
    "num_embeddings": 64,
}
IMAGE_TOKEN, VISION_START = 200, 201
_LARGEST = 60_000_000
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_SPARSE = {"mlp_layer_types": ["dense", *["sparse"] * 3]}
# What the decoder of a family needs besides sizes, and what the family does.
_TEXTS: dict[str, dict[str, Any]] = {
    "cohere_compass": {"rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE}},
    "deepseek_ocr2": _SPARSE,
    "dots3_note": {
        **dict.fromkeys(("num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads"), 4),
        **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank"), 24),
        **{"swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16},
    },
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [48, 48],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "glm4v_moe": {"rope_parameters": MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 32},
    "glm5_next": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "linear_num_heads": 4, "linear_head_dim": 16},
    **{name: {"unpadded_vocab_size": 256} for name in ("inkling2", "inkling2_loop")},
    "mistral_large4": {"num_key_value_heads": 4},
    "qwen4_exp": {
        **{"indexer_budget": 8, "indexer_compress_ratio": 4},
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16},
    },
    "unlimited_ocr": _SPARSE,
} | {
    name: {"rope_parameters": MROPE}
    for name in [
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen2_5_omni_thinker",
        "paddleocr_vl",
        "glm4v",
        "glm46v",
        "glmga",
        "glm_ocr",
        "hunyuan_vl",
    ]
}
_WRAPPERS: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 100, "audio_token_offset": 132},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "deepseek_vl_hybrid": {
        "high_res_vision_config": {"global_attn_indexes": [0, 1], "window_size": 2, "output_channels": 32}
    },
    "chameleon": {
        "vocabulary_map": {"<image>": IMAGE_TOKEN}
        | {f"IMGIMG{chr(65 + code // 10)}{chr(65 + code % 10)}Z": 100 + code for code in range(64)}
    },
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense"] * 2, "adapter_in_dim": 32, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
    },
    "emu3": {
        "vq_config": {"channel_multiplier": [1, 1], "attn_resolutions": [1]},
        "vocabulary_map": {"<image>": IMAGE_TOKEN, "<|extra_200|>": 199}
        | {f"<|visual token {code:06}|>": 100 + code for code in range(32)},
    },
    "fuyu": {"patch_size": 4},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
    "gemma3": {"mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layer": [-2, -1]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "vision_config": {"hidden_size": 64},
        "image_grid_pinpoints": [[16, 16]],
        "downsample_rate": "2/4",
    },
    "paligemma": {"projection_dim": 64},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "kimi_k25": {"projection_hidden_size": 32},
    **{name: {"image_grid_pinpoints": [[16, 16]]} for name in ("llava_next", "llava_next_video", "llava_onevision")},
    "muse_glimmer": {"projector_hidden_size": 64, "out_hidden_size": 128},
    "muse_spark": {
        "projector_hidden_size": 64,
        "out_hidden_size": 128,
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 16, 32, 64]},
    },
    "nemotron_h_omni": {
        "vision_hidden_size": 32,
        "projector_hidden_size": 64,
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "qwen2_vl": {"vision_config": {"hidden_size": 64}},
    "qwen2_5_vl": {"vision_config": {"window_size": 16, "fullatt_block_indexes": [1]}},
    **{name: {"vision_start_token_id": VISION_START} for name in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")},
    "ovis2": {"vocab_size": 256, "hidden_size": 64},
    "qwen3_vl": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "qwen3_vl_moe": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
}
_TOKENS = {
    "image_token": IMAGE_TOKEN,
    "image_patch": IMAGE_TOKEN,
    "vision_start_token": VISION_START,
    "vision_end_token": 202,
    "video_token": 203,
}


def _sized(config: PreTrainedConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config of some type that have sizes in a table."""
    aliases = getattr(type(config), "attribute_map", {})
    defaults = config.to_dict()
    fields = {name: size for name, size in sizes.items() if name in {*defaults, *aliases}}
    for name in fields:
        if isinstance(defaults.get(name), list | tuple):
            fields[name] = [fields[name]] * len(defaults[name])
    for alias, name in aliases.items():
        if name in fields:
            fields.pop(alias, None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if "mrope_section" in parameters:
        half = int(sizes["head_dim"] * parameters.get("partial_rotary_factor", 1)) // 2
        fields["rope_parameters"] = parameters | {"mrope_section": [half - 2 * (half // 4), half // 4, half // 4]}
    inner = {name: _sized(value, sizes) for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    return {"model_type": config.model_type} | fields | inner


def tiny_wrapper_config(model_type: str) -> PreTrainedConfig:
    """A small config of a multimodal family."""
    config, changes = CONFIG_MAPPING[model_type](), _WRAPPERS.get(model_type, {})
    text, fields = config.get_text_config(decoder=True), dict[str, Any]()
    parts = dict(vars(config))
    # Some families have no tower by default.
    if parts.get("vision_config", config) is None:
        parts["vision_config"] = config.sub_configs["vision_config"]()
    for name, value in parts.items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = _sized(value, TEXT if value is text else TOWER) | changes.get(name, {})
            if value is text:
                fields[name] |= OWN.get(text.model_type, {}) | _TEXTS.get(model_type, {})
    if text is config:
        fields |= _sized(config, TEXT) | OWN.get(model_type, {}) | _TEXTS.get(model_type, {}) | fields
    for stem, token in _TOKENS.items():
        fields |= {name: token for name in (f"{stem}_id", f"{stem}_index") if name in config.to_dict()}
    fields |= {name: value for name, value in changes.items() if name not in fields}
    return type(config)(**fields)


def tiny_wrapper(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A small random model, all of whose weights matter."""
    config = tiny_wrapper_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForMultimodalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size:,} parameters are left")
    generator = torch.Generator().manual_seed(0)
    model: PreTrainedModel = AutoModelForMultimodalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
        parameter.data = (noise + (parameter.dim() == 1 and not name.endswith("bias"))).to(dtype)
    return model
