"""Writing a pruned model as a Hugging Face folder that loads with and without this package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.models import PRUNED_CLASSES, modeling_pruned, quiet_transformers

_MODELING_FILE = Path(modeling_pruned.__file__)


def save_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes weights (safetensors), config, generation config and tokenizer; for a model whose layers differ, also the
    modelling code.

    `adapruner.load(folder)` reads it, and so does `AutoModelForCausalLM.from_pretrained(folder)` where this package is
    not installed, with `trust_remote_code=True` where layers differ. The folder appears whole or not at all.

    Args:
        model: as returned by `surgery.prune_model`.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    differs = isinstance(model, tuple(PRUNED_CLASSES.values()))
    if differs:
        classes: dict[str, Any] = {
            "AutoConfig": model.config_class,
            "AutoModel": model.decoder_class,
            "AutoModelForCausalLM": type(model),
        }
        model.config.auto_map = {
            auto_class: f"{_MODELING_FILE.stem}.{own_class.__name__}" for auto_class, own_class in classes.items()
        }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if differs:
        shutil.copy(_MODELING_FILE, partial / _MODELING_FILE.name)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
