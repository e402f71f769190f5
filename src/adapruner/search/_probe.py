"""The cost of giving single blocks of a pruned model other numbers of groups."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from adapruner.evaluation._losses import compute_prefix, losses_after_layers
from adapruner.models._architecture import architecture_of
from adapruner.models._layers import is_streamed, loaded_layer
from adapruner.planning._budget import kept_counts
from adapruner.planning._plan import make_plan
from adapruner.search._objective import JUDGED_TOGETHER, Objective, scores_of
from adapruner.search._space import Candidate
from adapruner.surgery._cut import prune_model, prune_on_reading

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
        self.counts = kept_counts(structure, candidate.budget)
        plan = make_plan(structure, self._scores, self.counts)
        self._model = prune_model(objective.model, structure, plan, objective.compensation)
        self._prefix = compute_prefix(self._model, windows, structure.layers)
        self._before = self._divergences([states[-1] for states in self._prefix.states])

    def _divergences(self, states: list[Tensor]) -> Tensor:
        """[windows], float64: divergences from the dense model.

        Args:
            states: of every batch, after the last layer.
        """
        after = losses_after_layers(self._model, self._windows, states, self._prefix.calls, self._references)
        return torch.cat(after)

    def added(self, changes: Sequence[tuple[int, int]]) -> Iterator[Measured | None]:
        """Increase of the divergence for each change alone, in nats per predicted token; None if it is not known.
        Layers that are streamed are read once for several changes.

        Args:
            changes: the number of a block, and the number of groups that it keeps.
        """
        at_once = JUDGED_TOGETHER if is_streamed(self._model) else 1
        for first in range(0, len(changes), at_once):
            chosen = changes[first : first + at_once]
            states = self._changed(chosen)
            for number in range(len(chosen)):
                added = self._divergences(states.pop(number)) - self._before if number in states else torch.empty(0)
                is_known = len(added) > 1 and added.isfinite().all()
                yield (float(added.mean()), float(added.std() / math.sqrt(len(added)))) if is_known else None

    def _changed(self, changes: Sequence[tuple[int, int]]) -> dict[int, list[Tensor]]:
        """By the number of the change, the hidden states of every batch after the last layer."""
        blocks = [self.objective.structure.blocks[number] for number, _ in changes]
        states: dict[int, list[Tensor]] = {}
        for index in range(self.objective.structure.layers):
            changed = [number for number, block in enumerate(blocks) if block.layer == index]
            if not states and not changed:
                continue
            with loaded_layer(self._model, index) as layer:
                states = {number: self._after(index, layer, before) for number, before in states.items()}
                for number in changed:
                    with self._in_place(*changes[number]):
                        states[number] = self._after(index, layer, [known[index] for known in self._prefix.states])
        return states

    @torch.inference_mode()
    def _after(self, index: int, layer: nn.Module, states: list[Tensor]) -> list[Tensor]:
        """The hidden states of every batch after a layer."""
        return [calls[index].run(layer, state) for calls, state in zip(self._prefix.calls, states, strict=True)]

    @contextlib.contextmanager
    def _in_place(self, number: int, count: int) -> Iterator[None]:
        """While it lasts, a block of a loaded layer keeps so many groups: its projections are those of a model in which
        it alone is cut. For heads, the whole attention module is replaced, because it may store its number of
        heads."""
        structure = self.objective.structure
        block, counts = structure.blocks[number], [block.groups for block in structure.blocks]
        counts[number] = count
        plan = make_plan(structure, self._scores, counts)
        alone = prune_on_reading(self.objective.model, structure, plan, self.objective.compensation)
        if block.kind == "heads":
            names = architecture_of(alone.config)
            paths = {f"{names.layers}.{block.layer}.{names.module_of('heads')}"}
        else:
            paths = {name.rpartition(".")[0] for name in block.slices_by_parameter}
        before = {path: self._model.get_submodule(path) for path in paths}
        with loaded_layer(alone, block.layer):
            try:
                for path in paths:
                    self._model.set_submodule(path, alone.get_submodule(path))
                yield
            finally:
                for path in paths:
                    self._model.set_submodule(path, before[path])
