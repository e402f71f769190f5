"""A preview of a run: the artifacts that it would make and the memory that it would need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import given_path
from adapruner.base.progress import Reporter
from adapruner.base.values import size_in_bytes
from adapruner.budget.counts import kept_counts
from adapruner.model.loading import empty_model, is_streamable
from adapruner.options import PruneConfig
from adapruner.run import choice, inputs, models
from adapruner.run.folder import RunFolder
from adapruner.run.memory import Memory, Placement, choose_placement, estimate_memory
from adapruner.run.options import earlier_run, register_extensions, resolve
from adapruner.run.prune import check, making_of
from adapruner.structure.blocks import count_parameters

_FLOAT32, _MIB = 4, 2**20


class Preview(BaseModel, frozen=True):
    """A preview of a run.

    Attributes:
        missing: the artifacts that would be made, in this order.
        parameters_before, parameters_after: of the given and of the pruned model; what the search chooses comes within
            0.5 percentage points of the latter.
        model_bytes: of the weights of the pruned model.
        moments_bytes: of the second moments, which the run folder keeps; 0 if they are not to be made.
        layer_wise: whether one decoder layer at a time would be in memory.
        memory: None if the pruned model is not missing, or its memory cannot be estimated.
    """

    ratio: float
    missing: list[str]
    parameters_before: int
    parameters_after: int
    model_bytes: int
    moments_bytes: int
    device: str
    layer_wise: bool
    memory: Memory | None


def preview(
    model: str | None,
    *,
    output: str | Path,
    recipe: str | Path | None = None,
    from_: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Preview:
    """A preview of `prune` with the same arguments, all of them names, after the same checks, from shapes and text: no
    weights are read, and nothing is written.

    Raises:
        AdaPrunerError: what the run would be refused for.
    """
    run = RunFolder(given_path(output))
    run.check_usable()
    earlier = earlier_run(from_, run)
    config = resolve({"model": model, **options}, None, run, recipe, None, earlier)
    making = making_of(config, run, Reporter(), earlier)
    check(making, overwrite)
    missing, placement, structure = making.missing(), making.value(inputs.placement), making.value(inputs.structure)
    counts = kept_counts(structure, making.value(inputs.starting_budget))
    after = structure.total_parameters - structure.removed_parameters(counts)
    moments = sum(block.inputs * block.inputs_of_one for block in structure.blocks)
    return Preview(
        ratio=making.value("ratio"),
        missing=[node.path for node in missing],
        parameters_before=count_parameters(empty_model(making.value(inputs.model_config))),
        parameters_after=after,
        model_bytes=after * making.value(inputs.precision).weights.itemsize,
        moments_bytes=moments * _FLOAT32 * (choice.moments in missing),
        device=placement.device,
        layer_wise=placement.layer_wise,
        memory=placement.memory if models.pruned in missing else None,
    )


@dataclass(frozen=True)
class Estimate:
    """The memory of a run, and where the layers of its model are.

    Attributes:
        fits: None for a GPU that is not here and whose memory is not stated.
        refusal: why a model that does not fit is refused.
    """

    placement: Placement
    memory: Memory
    fits: bool | None
    refusal: str = ""


def estimate(model: str | Path, memory: str | None = None, **options: Any) -> Estimate:
    """The memory that `prune` would need with these options, from shapes: no weights and no text are read.

    Args:
        memory: of the GPUs that the run would have instead of this machine, as 24GB or 4x80GB.
        options: the fields of `PruneOptions`; `device` may be `cuda` where there is none.

    Raises:
        AdaPrunerError: there is no such model, or an option will not do.
    """
    stated, gpus = _gpus(memory) if memory else (None, (torch.device("cuda"),))
    config = PruneConfig.from_options(model=str(model), **options)
    register_extensions(config)
    if memory and config.device not in ("auto", "cuda"):
        raise AdaPrunerError("`memory` is that of GPUs: leave `device` out")
    known: dict[str, Any] = {}
    if memory or (config.device == "cuda" and not torch.cuda.is_available()):
        known = {"main_device": gpus[0], "placement": Placement(gpus[:1], bool(config.layer_wise))}

    def placed(config: PruneConfig) -> tuple[Memory, Placement]:
        making = making_of(config, RunFolder.temporary(), Reporter())
        making.values |= known
        empty, structure = making.value(inputs.empty), making.value(inputs.structure)
        of_model = config, empty, structure, making.value(inputs.starting_budget)
        if stated is None:
            placement = making.value(inputs.placement)
        else:
            streamable = is_streamable(making.value(inputs.location), empty.config)
            placement = choose_placement(*of_model, gpus, streamable, stated)
        return estimate_memory(*of_model, placement.devices, placement.layer_wise, stated), placement

    refusal = ""
    try:
        needed, placement = placed(config)
    except AdaPrunerError as error:
        # Refused for another reason than memory, it is refused again.
        needed, placement = placed(config.model_copy(update={"ignore_memory": True}))
        refusal = str(error)
    return Estimate(placement, needed, None if known and stated is None else not refusal, refusal)


def _gpus(memory: str) -> tuple[int, tuple[torch.device, ...]]:
    """Bytes of one of several equal GPUs, and the GPUs, of a text such as 24GB or 4x80GB."""
    count, _, size = memory.rpartition("x")
    try:
        stated, number = size_in_bytes(size), int(count or 1)
    except ValueError:
        stated = number = 0
    if stated < _MIB or number < 1:  # without a unit, bytes
        raise AdaPrunerError(f"`memory` {memory!r} is not the memory of GPUs: expected one such as 24GB or 4x80GB")
    return stated, tuple(torch.device("cuda", n) for n in range(number))
