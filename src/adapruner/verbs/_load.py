"""Loading a model, pruned or dense."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from adapruner.config import Dtype
from adapruner.models import find_model, load_model


def load(model: str | Path, dtype: Dtype = "auto", device: str = "auto") -> PreTrainedModel:
    """Loads a pruned or a dense model, ready to `generate`.

    Args:
        model: hub id, model folder (as in `RUN/model`), `.gguf` file, or `smollm2`.
        dtype: `auto` keeps that of the checkpoint.
        device: `auto` takes the first GPU where there is one, else the CPU.

    Raises:
        AdaPrunerError: there is no such model, or it cannot be read.
    """
    return load_model(find_model(str(model)), dtype, device)
