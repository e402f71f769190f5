"""What can be pruned of a model, and what that would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from adapruner.config import PruneConfig
from adapruner.cost import Cost, choose_layer_wise, estimate_cost
from adapruner.errors import AdaPrunerError
from adapruner.job import outline
from adapruner.models import empty_model, find_model, load_config, resolve_device
from adapruner.progress import Reporter
from adapruner.structure import Structure, build_structure


def inspect(model: str | Path) -> Structure:
    """What of a model can be pruned, from its config alone.

    Raises:
        AdaPrunerError: there is no such model, or its family is not known.
    """
    return build_structure(empty_model(load_config(find_model(str(model)))))


def estimate(model: str | Path, device: str = "auto", timed: bool = True, **options: Any) -> Cost:
    """What `prune` would take with these options: the memory of each stage, and the time on this machine.

    Args:
        device: where the model would run; for one that is not here, there is no time.
        options: the fields of `PruneOptions`.

    Raises:
        AdaPrunerError: there is no such model, or an option will not do.
    """
    config = PruneConfig.from_options(model=str(model), device=device, **options)
    # Memory is known without the device.
    is_here = device != "cuda" or torch.cuda.is_available()
    where = resolve_device(device) if is_here else torch.device("cuda")
    location = find_model(str(model))
    own = outline(config, location)
    by_layer = config.layer_wise
    if by_layer is None and is_here:
        streamable = location.gguf_file is None
        try:
            by_layer = choose_layer_wise(own.config, own.model, own.structure, own.budget, where, streamable)
        except AdaPrunerError as error:
            Reporter().note(f"this does not fit here: {error}")
            by_layer = streamable
    return estimate_cost(own.config, own.model, own.structure, own.budget, where, timed and is_here, by_layer)
