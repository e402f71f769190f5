"""DeciLM (Nemotron-NAS) checkpoints: Llama with other widths in every layer, or without attention.

vLLM, SGLang, TensorRT-LLM and mlx-lm run them in classes of their own, with nothing padded.
"""

import json
import shutil
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.checkpoint import add_older_keys, read_origin, save_checkpoint
from adapruner.formats import Export, register_format
from adapruner.formats.gguf_checks import head_dim, layer_counts
from adapruner.model.layers import whole_state
from adapruner.remote_code import configuration_decilm
from adapruner.report.card import card_of_export, read_card

# Readers round the width of a feed-forward up to a multiple of this.
WIDTH_MULTIPLE = 256

# The file that transformers from this version on reads in place of config.json.
_CONFIG_OF_TRANSFORMERS = "config.4.0.0.json"
_ROPE_TYPES = ("default", "linear", "llama3")


def check_decilm(config: PreTrainedConfig) -> None:
    """Refuses a model that the engines would not compute exactly from a DeciLM checkpoint.

    Args:
        config: of a pruned model, or of a dense one to see before pruning if anything but the counts stands against it.
    """
    if config.model_type not in ("llama", "mistral"):
        raise AdaPrunerError(f"a DeciLM checkpoint is computed as Llama or Mistral, not as {config.model_type}")
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        raise AdaPrunerError(
            f"a DeciLM checkpoint has no sliding window, this model has one of {window} tokens for up to"
            f" {config.max_position_embeddings}"
        )
    if config.hidden_act != "silu":
        raise AdaPrunerError(f"a DeciLM checkpoint is computed with silu, not with {config.hidden_act}")
    if biases := [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, None)]:
        raise AdaPrunerError(f"a DeciLM checkpoint has no biases, this model has {biases[0]}")
    rope = config.rope_parameters
    if rope["rope_type"] not in _ROPE_TYPES or rope.get("partial_rotary_factor") not in (None, 1):
        raise AdaPrunerError(
            f"DeciLM has rotary embeddings of whole heads, of type {', '.join(_ROPE_TYPES)}; this model has {rope}"
        )
    layers = layer_counts(config)
    first: dict[tuple[int, int], int] = {}
    for layer, (heads, groups, width) in enumerate(layers):
        if heads:
            first.setdefault((heads, groups), layer)
        if width % WIDTH_MULTIPLE:
            raise AdaPrunerError(
                f"layer {layer} has {width} channels, in a DeciLM checkpoint a multiple of {WIDTH_MULTIPLE}: prune with"
                f" `round_to` {WIDTH_MULTIPLE}"
            )
    if len(first) > 1:
        (one, layer), (other, later) = list(first.items())[:2]
        raise AdaPrunerError(
            f"layer {layer} has {one[0]} query and {one[1]} key/value heads and layer {later} has {other[0]} and"
            f" {other[1]}; a DeciLM checkpoint has the same in all layers, or no attention: prune with `head_share` 0"
        )
    if not layers[0][0]:
        raise AdaPrunerError(
            "layer 0 has no attention, which vLLM and SGLang need in a DeciLM checkpoint: prune with `protect_first` 1"
        )
    if config.hidden_size % layers[0][0]:
        raise AdaPrunerError(
            f"the hidden size, {config.hidden_size}, is no multiple of the {layers[0][0]} heads, which the config of a"
            " DeciLM checkpoint refuses: prune with `head_share` 0"
        )


def write_decilm(model: PreTrainedModel, folder: Path, shard_size: str) -> None:
    """Writes weights, configs and the generation config of a model that `check_decilm` accepts.

    mlx-lm chooses its class by the `model_type` nemotron-nas of config.json. Transformers has no such type, and reads
    the second config, of `model_type` llama, from which config and tokenizer load without remote code.

    Args:
        shard_size: larger models are split into files of at most this size.
    """
    folder.mkdir()
    config, layers = model.config, layer_counts(model.config)
    absent = {"lm_head.weight"} if config.tie_word_embeddings else set()
    absent |= {f"model.layers.{layer}.input_layernorm.weight" for layer, (heads, *_) in enumerate(layers) if not heads}
    state = {name: tensor for name, tensor in whole_state(model).items() if name not in absent}
    save_torch_state_dict(state, folder, max_shard_size=shard_size)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)

    known = LlamaConfig().to_dict().keys()
    heads, groups, _ = layers[0]
    fields = {name: value for name, value in config.to_dict().items() if name in known} | {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim(config),
        # No layer has it, so a stock Llama refuses the weights, where it would initialise missing ones at random.
        "intermediate_size": 0,
        "architectures": ["DeciLMForCausalLM"],
        "block_configs": [_block_config(*counts, hidden=config.hidden_size) for counts in layers],
    }
    LlamaConfig.from_dict(fields).to_json_file(folder / _CONFIG_OF_TRANSFORMERS)
    code = Path(configuration_decilm.__file__)
    class_path = f"{code.stem}.{configuration_decilm.DeciLMConfig.__name__}"
    shutil.copyfile(code, folder / code.name)
    add_older_keys(folder / _CONFIG_OF_TRANSFORMERS)
    written = json.loads((folder / _CONFIG_OF_TRANSFORMERS).read_text(encoding="utf-8"))
    for name, added in (
        (_CONFIG_OF_TRANSFORMERS, {"auto_map": {"AutoConfig": class_path}}),
        ("config.json", {"model_type": "nemotron-nas", "configuration_files": [_CONFIG_OF_TRANSFORMERS]}),
    ):
        text = json.dumps(written | added, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _block_config(heads: int, groups: int, width: int, hidden: int) -> dict[str, dict[str, object]]:
    """The entry of a layer in `block_configs`. Readers compute the width as `int(2 * ffn_mult * hidden / 3)`, rounded
    up to a multiple of 256; mlx-lm rounds `ffn_mult` to 6 digits before."""
    return {
        "attention": {
            "no_op": not heads,
            "replace_with_linear": False,
            "n_heads_in_group": heads // groups if heads else None,
        },
        "ffn": {"no_op": False, "replace_with_linear": False, "ffn_mult": 3 * width / (2 * hidden)},
    }


@register_format("decilm", lambda model, _: check_decilm(model.config))
def _export(export: Export) -> None:
    origin = read_origin(export.location)
    card = card_of_export(read_card(export.location))
    save_checkpoint(export.model, export.tokenizer, export.path, card, record=origin, write=write_decilm)
