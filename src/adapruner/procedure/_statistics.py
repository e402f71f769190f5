"""What is measured of the dense model: second moments, and the statistics of every group."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adapruner.artifacts import Form, artifact
from adapruner.files import write_atomically
from adapruner.importance import needed_statistics
from adapruner.job import Job, needs_moments
from adapruner.measurement import (
    Statistics,
    StoredMoments,
    measure_in_parts,
    measure_moments,
    projected_blocks,
    removal_errors,
)
from adapruner.memory import MEASURED_AT_ONCE
from adapruner.models import in_fastest_dtype
from adapruner.procedure._forms import Windows
from adapruner.procedure._windows import self_written, usable, windows

Moments = StoredMoments | None
MOMENTS: Form[StoredMoments] = Form(lambda moments, path: shutil.move(moments.folder, path), StoredMoments)
STATISTICS: Form[Statistics] = Form(Statistics.save, Statistics.load)


@artifact(
    "moments",
    MOMENTS,
    inputs=(windows, self_written),
    options="self_windows head_granularity expert_granularity",
    leaves="model family precision left_out",
    is_wanted=needs_moments,
    is_result=False,
)
def moments(job: Job, work: Path, windows: Windows, written: Windows | None) -> StoredMoments:
    """Second moments of all blocks; those of finished blocks are kept."""
    moments, prepared = StoredMoments(work), job.prepared
    missing = [index for index in projected_blocks(prepared.structure) if not moments.path(index).is_file()]
    if missing:
        text, fast = text_to_fit(job, windows, written), in_fastest_dtype(prepared.dense)
        with prepared.reporter.stage("reading activations", prepared.structure.layers) as advance:
            for index, block_moments in measure_moments(fast, prepared.structure, text, missing, progress=advance):
                write_atomically(moments.path(index), block_moments.save)
    return moments


def text_to_fit(job: Job, windows: Windows, written: Windows | None) -> Tensor:
    """[windows, tokens], int64: what compensation is fitted on, mixed, because some of it is held out."""
    text = usable(job, windows)["compensation"]
    both = torch.cat([text, written["compensation"]]) if written else text
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(job.config.seed))]


@artifact(
    "statistics.safetensors",
    STATISTICS,
    inputs=(windows, moments),
    options="terms space head_granularity expert_granularity",
    leaves="model family precision left_out",
    is_result=False,
    is_shared=True,
    version=2,
)
def statistics(job: Job, work: Path, windows: Windows, moments: Moments) -> Statistics | None:
    """Statistics of the pool, measured part by part; of several processes, each measures its share."""
    prepared, pool = job.prepared, usable(job, windows)["pool"]
    size = MEASURED_AT_ONCE[prepared.layer_wise]
    parts = {start: work / f"{start:06}.safetensors" for start in range(0, len(pool), size)}
    own = list(parts)[prepared.process.rank :: prepared.process.count]
    missing = [start for start in own if not parts[start].is_file()]
    with prepared.reporter.stage("measuring", len(own)) as advance:
        advance(len(own) - len(missing))
        for start, part in measure_in_parts(
            prepared.dense,
            prepared.structure,
            pool,
            size,
            terms=job.config.terms,
            layer_wise=prepared.layer_wise,
            folder=work,
            starts=missing,
        ):
            write_atomically(parts[start], part.save)
            advance()
    prepared.process.wait()
    if not prepared.process.leads:
        return None
    statistics = Statistics.concatenate([Statistics.load(path) for path in parts.values()])
    if moments is not None and "moments" in needed_statistics(job.config.space, job.config.terms):
        with prepared.reporter.stage("comparing removals", len(moments)) as advance:
            errors = removal_errors(prepared.dense, prepared.structure, moments, advance)
        statistics = replace(statistics, **errors)
    return statistics
