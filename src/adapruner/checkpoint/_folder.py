"""Writing a pruned model as a Hugging Face folder that loads with and without this package."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.files import replace_folder, saying_what_cannot_be_written, write_atomically
from adapruner.models import quiet_transformers, whole_state


def save_checkpoint(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, card: str | None = None, shard_size: str = "2GB"
) -> None:
    """Writes weights (safetensors), config, generation config, tokenizer and model card; for a model whose layers
    differ, also the modelling code.

    `adapruner.load(folder)` reads it, and so does `AutoModelForCausalLM.from_pretrained(folder)` where this package is
    not installed, with `trust_remote_code=True` where layers differ. The folder appears whole or not at all.

    Args:
        model: as returned by `surgery.prune_model`; its dtype is kept.
        card: the content of README.md.
        shard_size: larger models are split into files of at most this size, which is also what writing takes of memory.

    Raises:
        AdaPrunerError: it cannot be written.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _make_generation_config_valid(model)
    with saying_what_cannot_be_written(folder):
        with quiet_transformers():
            model.save_pretrained(partial, max_shard_size=shard_size, state_dict=whole_state(model))
        tokenizer.save_pretrained(partial)
        _complete_config(partial / "config.json", _deci_architecture(model))
        if card is not None:
            write_card(partial, card)
        replace_folder(partial, folder)


def _make_generation_config_valid(model: PreTrainedModel) -> None:
    """Some models come with settings of sampling but without sampling, which transformers reads and does not write."""
    settings: Any = model.generation_config
    try:
        settings.validate(strict=True)
    except ValueError:
        model.generation_config = copy.deepcopy(settings)
        model.generation_config.do_sample = True


def write_card(folder: Path, card: str) -> None:
    """Writes the README.md of a checkpoint."""
    write_atomically(folder / "README.md", lambda partial: partial.write_text(card))


def _complete_config(path: Path, other_architectures: list[str]) -> None:
    """Adds to a config what other readers look for."""
    fields = json.loads(path.read_text())
    fields["architectures"] = other_architectures + fields["architectures"]
    fields |= _older_rope_keys(fields["model_type"], fields.get("rope_parameters"))
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _older_rope_keys(model_type: str, parameters: Any) -> dict[str, Any]:
    """transformers 4 does not read `rope_parameters`, and would silently take a theta of 10,000."""
    # Where layers of different types have their own, older versions have other keys in every family.
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return {}
    names = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    if model_type == "gpt_neox":
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    older = {names[name]: value for name, value in parameters.items() if name in names}
    scaling = {name: value for name, value in parameters.items() if name not in names}
    return older | ({"rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else {})


def _deci_architecture(model: PreTrainedModel) -> list[str]:
    """vLLM builds a Llama whose layers differ in channels alone as this architecture of its own, out of the
    `block_configs` that the config class in the folder offers."""
    return ["DeciLMForCausalLM"] if getattr(model.config, "block_configs", None) else []
