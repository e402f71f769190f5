"""What of a model can be pruned, and the memory that pruning it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError
from adapruner.job import reference_budget, register_extensions
from adapruner.memory import Memory, choose_layer_wise, estimate_memory
from adapruner.models import empty_model, find_model, load_config, resolve_device
from adapruner.progress import Reporter
from adapruner.structure import Structure, build_structure


def inspect(model: str | Path) -> Structure:
    """What of a model can be pruned, from its config alone.

    Raises:
        AdaPrunerError: there is no such model, or its family is not known.
    """
    return build_structure(empty_model(load_config(find_model(str(model)))))


@dataclass(frozen=True)
class Estimate:
    """The memory of every stage of a run, on a device, with or without `layer_wise`."""

    device: torch.device
    layer_wise: bool
    stages: dict[str, Memory]


def estimate(model: str | Path, **options: Any) -> Estimate:
    """The memory that `prune` would need with these options, from shapes: no weights are read.

    Args:
        options: the fields of `PruneOptions`; `device` may be `cuda` where there is none.

    Raises:
        AdaPrunerError: there is no such model, or an option will not do.
    """
    config = PruneConfig.from_options(model=str(model), **options)
    register_extensions(config)
    is_here = config.device != "cuda" or torch.cuda.is_available()
    device = resolve_device(config.device) if is_here else torch.device("cuda")
    location = find_model(config.model)
    empty = empty_model(load_config(location))
    structure = build_structure(empty, config.head_granularity)
    about = config, empty, structure, reference_budget(config, structure, max(config.ratio)), device
    layer_wise = bool(config.layer_wise)
    if is_here:
        streamable = location.gguf_file is None
        try:
            layer_wise = choose_layer_wise(*about, streamable)
        except AdaPrunerError as error:
            Reporter().note(str(error))
            layer_wise = streamable if config.layer_wise is None else config.layer_wise
    stages = estimate_memory(*about, layer_wise)
    return Estimate(device, layer_wise, stages)
