"""From a model and text to what was measured of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.calibration import generate_windows
from adapruner.errors import AdaPrunerError, NonFiniteError
from adapruner.evaluation import losses_by_batch
from adapruner.job import Job, needs_moments, window_counts
from adapruner.measurement import Statistics, StoredMoments, measure_in_parts, measure_moments, removal_errors
from adapruner.memory import MEASURED_AT_ONCE
from adapruner.models import in_fastest_dtype, load_model
from adapruner.progress import Reporter


def stage_load(job: Job, reporter: Reporter) -> PreTrainedModel:
    """The dense model."""
    with reporter.stage("loading", 1) as advance:
        model = load_model(job.location, job.config.dtype, job.config.device, job.layer_wise)
        advance()
    return model


def stage_windows(job: Job, model: PreTrainedModel, reporter: Reporter) -> dict[str, Tensor]:
    """The windows of every use, kept in the run folder; the model writes those that it shall write."""
    if job.run.windows.is_file():
        return load_file(job.run.windows)
    windows = dict(job.windows)
    for number, (use, count) in enumerate(window_counts(job.config).items()):
        if use not in windows:
            with reporter.stage(f"writing {use}", 1) as advance:
                length = job.config.recovery.seq_len if use == "recovery" else job.config.seq_len
                windows[use] = generate_windows(model, count, length, 4 * job.config.seed + number)
                advance()
    job.run.save_windows(windows)
    return windows


def drop_broken_windows(
    job: Job, model: PreTrainedModel, windows: dict[str, Tensor], error: NonFiniteError, reporter: Reporter
) -> dict[str, Tensor]:
    """Leaves out the windows on which the dense model's loss is not finite, and names them.

    Args:
        error: what made somebody look.

    Raises:
        NonFiniteError: the same, where no window is to blame.
        AdaPrunerError: the model is to blame, or too few windows are left.
    """
    fast, kept = in_fastest_dtype(model), dict(windows)
    for use in ("pool", "objective", "compensation"):
        if use in windows:
            finite = torch.cat(list(losses_by_batch(fast, windows[use]))).isfinite()
            kept[use] = windows[use][finite]
            broken = [int(number) for number in torch.nonzero(~finite).flatten()]
            at_least = {"pool": job.config.samples, "objective": 1, "compensation": 2}[use]
            if 2 * len(broken) > len(finite) or len(kept[use]) < at_least:
                raise AdaPrunerError(
                    f"the loss of the model is not finite on {len(broken)} of the {len(finite)} windows of the {use}:"
                    " its weights are broken or its dtype is too narrow: try --dtype float32"
                ) from None
            if broken:
                reporter.note(
                    f"left out, because the model's loss on them is not finite: windows {broken} of the {use}"
                )
    if all(len(kept[use]) == len(windows[use]) for use in windows):
        raise error
    job.run.replace_windows(kept)
    job.study.register()
    return kept


def stage_moments(
    job: Job, model: PreTrainedModel, windows: dict[str, Tensor], reporter: Reporter
) -> StoredMoments | None:
    """Second moments of all blocks; those that are there stay."""
    if not needs_moments(job.config):
        return None
    run = job.run
    run.moments.mkdir(exist_ok=True)
    moments = StoredMoments(run.moments)
    missing = [index for index in range(len(job.structure.blocks)) if not moments.path(index).is_file()]
    if missing:
        text, fast = windows["compensation"], in_fastest_dtype(model)
        with reporter.stage("reading activations", job.structure.layers) as advance:
            for index, block_moments in measure_moments(fast, job.structure, text, missing, progress=advance):
                run.save_moments(block_moments, moments.path(index))
    return moments


def stage_measure(
    job: Job, model: PreTrainedModel, pool: Tensor, moments: StoredMoments | None, reporter: Reporter
) -> Statistics:
    """Measures the pool part by part; parts that an earlier call or another process finished are not measured again."""
    run = job.run
    if run.statistics.is_file():
        shutil.rmtree(run.statistics_parts, ignore_errors=True)
        return Statistics.load(run.statistics)
    with reporter.stage("measuring", len(pool)) as advance:
        done = 0
        for start in _measure_missing_parts(job, model, pool):
            advance(start - done)
            done = start
        advance(len(pool) - done)
    statistics = Statistics.concatenate([Statistics.load(path) for _, path in _parts(job, pool)])
    assert len(statistics) == len(pool)
    if moments is not None and job.config.space == "extended":
        with reporter.stage("comparing removals", len(moments)) as advance:
            alone, eliminated = removal_errors(model, job.structure, moments, advance)
        statistics = replace(statistics, removal_error=alone, elimination_error=eliminated)
    run.save_statistics(statistics)
    shutil.rmtree(run.statistics_parts, ignore_errors=True)
    return statistics


def help_measuring(job: Job, model: PreTrainedModel, pool: Tensor, begin_at: float, reporter: Reporter) -> None:
    """Measures parts of the pool beside the process that leads.

    Args:
        begin_at: share of the pool to begin behind, to meet others late.
    """
    with reporter.stage("helping to measure", len(pool)) as advance:
        try:
            for _ in _measure_missing_parts(job, model, pool, begin_at):
                advance(_part_size(job))
        except (AdaPrunerError, OSError, SafetensorError):
            # All is measured, and the folder of the parts is gone.
            if not job.run.statistics.is_file():
                raise
    if job.run.statistics.is_file():
        shutil.rmtree(job.run.statistics_parts, ignore_errors=True)


def _measure_missing_parts(job: Job, model: PreTrainedModel, pool: Tensor, begin_at: float = 0.0) -> Iterator[int]:
    """Measures those parts of the pool that nobody has measured yet; yields the number of the first window of each."""
    run, study = job.run, job.study.name
    run.statistics_parts.mkdir(exist_ok=True)
    parts = _parts(job, pool)
    first = int(begin_at * len(parts))
    order = parts[first:] + parts[:first]
    paths = dict(parts)
    for start, part in measure_in_parts(
        model,
        job.structure,
        pool,
        _part_size(job),
        terms=job.config.terms,
        layer_wise=job.layer_wise,
        folder=run.statistics_parts,
        starts=(start for start, path in order if not path.is_file() and not run.statistics.is_file()),
    ):
        job.study.check_name(study)
        run.save_part(part, paths[start])
        yield start


def _parts(job: Job, pool: Tensor) -> list[tuple[int, Path]]:
    """The number of the first window of each part, and its file; processes may differ in how many go into one."""
    size = _part_size(job)
    folder = job.run.statistics_parts
    return [(start, folder / f"{start:06}-{size}.safetensors") for start in range(0, len(pool), size)]


def _part_size(job: Job) -> int:
    return MEASURED_AT_ONCE[job.layer_wise]
