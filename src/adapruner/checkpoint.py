"""Writing a pruned model as a Hugging Face folder that loads with and without this package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.models import modeling_pruned, quiet_transformers

_MODELING_FILE = Path(modeling_pruned.__file__)


def save_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes weights (safetensors), config with `per_layer_config`, generation config, tokenizer and modelling code.

    `adapruner.load(folder)` reads it, and so does `AutoModelForCausalLM.from_pretrained(folder,
    trust_remote_code=True)` where this package is not installed. The folder appears whole or not at all.

    Args:
        model: as returned by `surgery.prune_model`.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    classes: dict[str, Any] = {
        "AutoConfig": model.config_class,
        "AutoModel": model.decoder_class,
        "AutoModelForCausalLM": type(model),
    }
    model.config.auto_map = {
        auto_class: f"{_MODELING_FILE.stem}.{own_class.__name__}" for auto_class, own_class in classes.items()
    }
    with quiet_transformers():
        model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.copy(_MODELING_FILE, partial / _MODELING_FILE.name)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
