"""The cost of giving single blocks of a pruned model other numbers of groups."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.evaluation import compute_prefix, losses_by_batch
from adapruner.models import architecture_of
from adapruner.planning import kept_counts, make_plan
from adapruner.search._objective import Objective, scores_of
from adapruner.search._space import Candidate
from adapruner.structure import Block
from adapruner.surgery import kept_layers, prune_model

# The mean over windows, and its standard error.
Measured: TypeAlias = tuple[float, float]


class Probe:
    """A pruned model whose single blocks are given other numbers of groups.

    Attributes:
        objective: holds the dense model, its structure and statistics.
        budget: of the pruned model.
        counts: number of groups that each block keeps.
    """

    def __init__(self, objective: Objective, windows: Tensor, references: list[Tensor], candidate: Candidate) -> None:
        self.objective, self.budget = objective, candidate.budget
        self._windows, self._references = windows, references
        structure = objective.structure
        self._scores = scores_of(structure, objective.statistics, candidate)
        self.counts = kept_counts(structure, candidate.budget, self._scores)
        plan = make_plan(structure, self._scores, self.counts)
        self._layers = kept_layers(structure, plan)
        self._model = prune_model(objective.model, structure, plan, objective.compensation)
        self._prefix = compute_prefix(self._model, windows, len(self._layers))
        self._before = self._divergences(len(self._layers))

    def _divergences(self, same: int) -> Tensor:
        """[windows], float64: divergences from the dense model; the first `same` layers are unchanged."""
        batches = losses_by_batch(self._model, self._windows, self._references, prefix=self._prefix, prefix_layers=same)
        return torch.cat(list(batches))

    def added(self, number: int, count: int) -> Measured | None:
        """Increase of the divergence if a block keeps `count` groups, in nats per predicted token; None if it is not
        known."""
        structure, compensation = self.objective.structure, self.objective.compensation
        block, counts = structure.blocks[number], [block.groups for block in structure.blocks]
        if block.layer not in self._layers:
            return None
        counts[number] = count
        alone = prune_model(self.objective.model, structure, make_plan(structure, self._scores, counts), compensation)
        same = self._layers.index(block.layer)
        with _in_place(self._model, alone, block, same):
            added = self._divergences(same) - self._before
        if len(added) < 2 or not added.isfinite().all():
            return None
        return float(added.mean()), float(added.std() / math.sqrt(len(added)))


@contextlib.contextmanager
def _in_place(model: PreTrainedModel, other: PreTrainedModel, block: Block, layer: int) -> Iterator[None]:
    """While it lasts, the projections of a block are those of another model, which has all layers. For heads, the whole
    attention module is replaced, because it may store its number of heads.

    Args:
        layer: the number of the layer of the block in the first model.
    """
    if block.kind == "heads":
        names = architecture_of(other.config)
        paths = {f"{names.layers}.{block.layer}.{names.module_of('heads')}"}
    else:
        paths = {name.rpartition(".")[0] for name in block.slices_by_parameter}
    replaced = {path: path.replace(f".{block.layer}.", f".{layer}.", 1) for path in paths}
    before = {path: model.get_submodule(replaced[path]) for path in paths}
    try:
        for path in paths:
            model.set_submodule(replaced[path], other.get_submodule(path))
        yield
    finally:
        for path in paths:
            model.set_submodule(replaced[path], before[path])
