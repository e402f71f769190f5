"""The dense model, where it is in memory."""

from __future__ import annotations

from functools import partial

import torch
from transformers import PreTrainedModel

from adapruner.config import PruneConfig
from adapruner.memory import Placement, choose_placement, estimate_memory, room_for_moments
from adapruner.models._architecture import check_length, is_pruned
from adapruner.models._device import copy_in_dtype, usable_devices
from adapruner.models._loading import check_streamable, is_streamable, load_model
from adapruner.models._places import ModelLocation
from adapruner.planning._budget import Budget
from adapruner.progress import Reporter
from adapruner.recovery._checks import check_trainer_options
from adapruner.run.nodes.declared import GRAPH
from adapruner.run.nodes.inputs import Precision
from adapruner.structure._blocks import Structure


@GRAPH.leaf()
def is_mapped(location: ModelLocation) -> bool:
    """True if weights are mapped from files, which takes no time and no memory of their own."""
    return location.gguf_file is None


@GRAPH.leaf(lambda placement: {"layer_wise": placement.layer_wise})
def placement(
    config: PruneConfig,
    location: ModelLocation,
    empty: PreTrainedModel,
    structure: Structure,
    starting_budget: Budget,
    device: str,
    layer_wise: bool | None,
) -> Placement:
    """The devices of the layers. How much memory is free decides only whether the run is refused."""
    check_length(empty.config, max(config.seq_len, config.recovery.seq_len if config.recover else 0))
    if config.recover:
        check_trainer_options(config.recovery)
    if layer_wise:
        check_streamable(location, empty.config)
    streamable = is_streamable(location, empty.config)
    about = config, empty, structure, starting_budget, usable_devices(device), streamable
    return choose_placement(*about)


@GRAPH.leaf()
def memory_for_moments(
    config: PruneConfig,
    empty: PreTrainedModel,
    structure: Structure,
    starting_budget: Budget,
    placement: Placement,
) -> dict[torch.device, int]:
    """Bytes that second moments may occupy on each device; none where the memory of the run cannot be told."""
    if is_pruned(empty.config):
        return {}
    devices = placement.devices
    needed = estimate_memory(config, empty, structure, starting_budget, devices, placement.layer_wise)
    return room_for_moments(devices[0], needed)


@partial(GRAPH.costly, is_read_again_if="is_mapped")
def dense(
    location: ModelLocation,
    precision: Precision,
    placement: Placement,
    reporter: Reporter,
) -> PreTrainedModel:
    with reporter.stage("loading"):
        return load_model(location, precision.asked, placement.device, placement.layer_wise)


@GRAPH.costly
def dense_fast(dense: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """The same in the dtype of trials."""
    return dense if precision.trials == dense.dtype else copy_in_dtype(dense, precision.trials)
