"""What a run would make, before it is made."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from adapruner import procedure
from adapruner.driver import Driver
from adapruner.memory import Memory, estimate_memory
from adapruner.models import empty_model, is_pruned
from adapruner.planning import kept_counts
from adapruner.structure import count_parameters

_FLOAT32 = 4


class Preview(BaseModel):
    """What a run for one ratio would make.

    Attributes:
        folder: of the ratio.
        missing: the artifacts that would be made, in this order.
        parameters_before, parameters_after: of the given and of the pruned model; what the search chooses comes within
            0.5 percentage points of the latter.
        model_bytes: of the weights of the pruned model.
        moments_bytes: of the second moments, which the run folder keeps; 0 if they are not to be made.
        layer_wise: whether one decoder layer at a time would be in memory.
        stages: the memory of every stage, in bytes; empty if nothing is missing, or it cannot be estimated.
    """

    model_config = ConfigDict(frozen=True)

    ratio: float
    folder: str
    missing: list[str]
    parameters_before: int
    parameters_after: int
    model_bytes: int
    moments_bytes: int
    device: str
    layer_wise: bool
    stages: dict[str, Memory]


def preview(driver: Driver) -> Preview:
    """What is missing of one ratio of a run, from shapes and text: no weights are read."""
    job, prepared = driver.job, driver.job.prepared
    (ratio,) = job.config.ratio
    missing = driver.missing()
    structure, budget = prepared.structure, job.budget(ratio)
    after = structure.total_parameters - structure.removed_parameters(kept_counts(structure, budget))
    stages = {}
    if procedure.model in missing and not is_pruned(prepared.empty.config):
        about = job.config, prepared.empty, structure, budget, prepared.device, prepared.layer_wise
        stages = estimate_memory(*about, len(prepared.placement.devices))
    moments = sum(block.inputs * block.inputs_of_one for block in structure.blocks) * _FLOAT32
    return Preview(
        ratio=ratio,
        folder=str(job.folder.path),
        missing=[artifact.name for artifact in missing],
        parameters_before=count_parameters(empty_model(prepared.config_given)),
        parameters_after=after,
        model_bytes=after * prepared.dtype.itemsize,
        moments_bytes=moments if procedure.moments in missing else 0,
        device=prepared.placement.device,
        layer_wise=prepared.layer_wise,
        stages=stages,
    )
