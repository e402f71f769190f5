"""Measurements of the dense model: second moments, and the statistics of every group."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from adapruner.config import Space, Terms
from adapruner.files import is_whole, write_atomically
from adapruner.graph.records import Form
from adapruner.importance._terms import needs_moments, needs_removal_errors
from adapruner.measurement._moments import StoredMoments, measure_moments, projected_blocks
from adapruner.measurement._removal import removal_errors
from adapruner.measurement._samples import measure_in_parts
from adapruner.measurement._statistics import Statistics
from adapruner.memory import Placement
from adapruner.option_rules import MEASURED_AT_ONCE
from adapruner.progress import Reporter
from adapruner.run.nodes.declared import GRAPH
from adapruner.run.nodes.forms import Windows
from adapruner.structure._blocks import Structure

MOMENTS: Form[StoredMoments] = Form(lambda moments, path: shutil.move(moments.folder, path), StoredMoments)
STATISTICS: Form[Statistics] = Form(Statistics.save, Statistics.load)


@GRAPH.kept("moments", MOMENTS, is_wanted=needs_moments)
def moments(
    dense_fast: PreTrainedModel, structure: Structure, text_to_fit: Tensor | None, reporter: Reporter, work: Path
) -> StoredMoments:
    """Second moments of all blocks; those of finished blocks are kept."""
    moments = StoredMoments(work)
    missing = [index for index in projected_blocks(structure) if not is_whole(moments.path(index))]
    if missing:
        assert text_to_fit is not None
        with reporter.stage("reading activations", structure.layers) as advance:
            for index, of_block in measure_moments(dense_fast, structure, text_to_fit, missing, progress=advance):
                write_atomically(moments.path(index), of_block.save)
    return moments


@GRAPH.leaf(lambda compares: compares)
def compares_removals(space: Space, terms: Terms) -> bool:
    """True if terms need the errors that removing groups makes."""
    return needs_removal_errors(space, terms)


@GRAPH.kept("statistics.safetensors", STATISTICS, version=3)
def statistics(
    dense: PreTrainedModel,
    structure: Structure,
    placement: Placement,
    windows: Windows,
    moments: StoredMoments | None,
    compares_removals: bool,
    terms: Terms,
    reporter: Reporter,
    work: Path,
) -> Statistics:
    """Statistics of the pool, measured part by part; finished parts are kept."""
    pool, size = windows["pool"], MEASURED_AT_ONCE[placement.layer_wise]
    parts = {start: work / f"{start:06}.safetensors" for start in range(0, len(pool), size)}
    missing = [start for start, path in parts.items() if not is_whole(path)]
    with reporter.stage("measuring", len(parts)) as advance:
        advance(len(parts) - len(missing))
        layer_wise = placement.layer_wise
        for start, part in measure_in_parts(
            dense, structure, pool, size, terms=terms, layer_wise=layer_wise, folder=work, starts=missing
        ):
            write_atomically(parts[start], part.save)
            advance()
    statistics = Statistics.concatenate([Statistics.load(path) for path in parts.values()])
    if moments is not None and compares_removals:
        with reporter.stage("comparing removals", len(moments)) as advance:
            statistics = replace(statistics, **removal_errors(dense, structure, moments, advance))
    return statistics
