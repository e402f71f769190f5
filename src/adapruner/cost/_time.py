"""The time that each stage takes, from the same work on a model of very few layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from adapruner.config import PruneConfig
from adapruner.cost._memory import MEASURED_AT_ONCE, shortened_model
from adapruner.evaluation import losses_by_batch
from adapruner.measurement import InputMoments, measure, measure_moments, removal_errors
from adapruner.models import in_fastest_dtype
from adapruner.planning import Budget, kept_counts
from adapruner.structure import Structure, build_structure
from adapruner.surgery import compensate

# Layers of the two models whose times are compared. Where all layers keep their activations, memory is taken from the
# system again and again, which few layers do not show.
_LAYERS = {False: (2, 6), True: (1, 3)}
# Windows of a timed forward pass.
_FORWARD_WINDOWS = 16
_MOMENTS_WINDOWS = (32, 64)
# Three searched points and the best fixed metric.
_FINALISTS = 4
# Bytes; the most that counts in glibc is 32 MiB.
_KEPT_WHEN_FREED = 31 * 2**20
# Seconds from which work is not repeated.
_LONG = 5.0


@dataclass(frozen=True)
class _Work:
    """Seconds of some work on a model: what it takes without layers, and each layer."""

    fixed: float
    layer: float

    def of(self, layers: float) -> float:
        return self.fixed + layers * self.layer


def estimate_seconds(
    config: PruneConfig,
    model_config: PreTrainedConfig,
    structure: Structure,
    budget: Budget,
    device: torch.device,
    dtype: torch.dtype,
    layer_wise: bool,
) -> dict[str, float]:
    """Seconds of the stages that take long, on this machine as it is now. Takes what a few layers take.

    A search is counted without trials that are stopped early, which are about half.

    Args:
        budget: what is to go; where it is searched, what the search starts from.
        device: where the model will run.
        dtype: of the weights.
    """
    # Once a process has freed a block of this size, glibc keeps smaller ones, as it does in a run by then.
    torch.empty(_KEPT_WHEN_FREED, dtype=torch.uint8)
    few = _FewLayers(config, model_config, device, dtype, layer_wise)
    layers = structure.layers
    forward = few.forward()
    measuring = few.measuring().of(layers) * config.pool / few.samples
    window, choosing = few.moments()
    seconds = {}
    if config.compensation != "none" or config.space == "extended":
        seconds["reading activations"] = layers * (window * config.compensation_windows + choosing)
    seconds["measuring"] = measuring
    if config.space == "extended":
        seconds["comparing removals"] = layers * few.removals()
    cut = _Cut(structure, kept_counts(structure, budget))
    solving = few.compensation(cut) if config.compensation != "none" else 0.0
    seconds["searching"] = _searching(config, cut, forward, solving)
    if config.fits_sequentially:
        seconds["compensating"] = solving + config.compensation_windows * _fitting(
            cut, forward.layer / _FORWARD_WINDOWS, window
        )
    return seconds


@dataclass(frozen=True)
class _Cut:
    """What a budget takes: `counts` are the groups that each block of `structure` keeps."""

    structure: Structure
    counts: list[int]

    @property
    def blocks(self) -> list[int]:
        """Those that lose something."""
        return [index for index, block in enumerate(self.structure.blocks) if self.counts[index] < block.groups]

    @property
    def layers(self) -> list[int]:
        """The layers of these blocks."""
        return [self.structure.blocks[index].layer for index in self.blocks]

    def kept_layers(self, first: int, end: int) -> float:
        """What stays of the layers from `first` to before `end`: by their parameters, in whole layers."""
        return sum(self._kept_share(layer) for layer in range(first, end))

    def _kept_share(self, layer: int) -> float:
        own = [
            (block, count)
            for block, count in zip(self.structure.blocks, self.counts, strict=True)
            if block.layer == layer
        ]
        whole = sum(block.groups * block.parameters_per_group for block, _ in own)
        return sum(count * block.parameters_per_group for block, count in own) / whole


def _searching(config: PruneConfig, cut: _Cut, forward: _Work, solving: float) -> float:
    # The dense model reads everything once. Layers in front of the first that is cut are known then, and what stays of
    # the others is what is computed.
    layers, first = cut.structure.layers, min(cut.layers)
    passes = [windows / _FORWARD_WINDOWS for windows in (config.objective_windows, config.final_windows)]
    trial, finalist = (solving + forward.of(cut.kept_layers(first, layers)) * each for each in passes)
    finalists = _FINALISTS if config.final_windows else 0
    return forward.of(layers + first) * sum(passes) + config.trials * trial + finalists * finalist


def _fitting(cut: _Cut, layer: float, window: float) -> float:
    """Of one window, where a layer reads it in `layer` seconds, and with its moments summed in `window` seconds."""
    first, last = min(cut.layers), max(cut.layers)
    # Both models up to the last layer that is cut, the pruned one from the first on.
    run = last + 1 + cut.kept_layers(first + 1, last + 1)
    return run * layer + len(cut.blocks) * max(0.0, window - layer)


class _FewLayers:
    """Two models of very few layers, and the seconds of what is done with them.

    Attributes:
        samples: that are measured at once.
    """

    def __init__(
        self,
        config: PruneConfig,
        model_config: PreTrainedConfig,
        device: torch.device,
        dtype: torch.dtype,
        layer_wise: bool,
    ) -> None:
        self.samples = MEASURED_AT_ONCE[layer_wise]
        self._config, self._layer_wise = config, layer_wise
        self._models = [_random_model(model_config, layers, device, dtype) for layers in _LAYERS[layer_wise]]
        self._running = [in_fastest_dtype(model) for model in self._models]
        self._smallest = self._models[0]
        self._structure = build_structure(self._smallest, config.head_granularity)
        embeddings: Any = self._smallest.get_input_embeddings()
        self._text = torch.randint(0, embeddings.weight.shape[0], (max(_MOMENTS_WINDOWS), config.seq_len))

    def forward(self) -> _Work:
        """Reading `_FORWARD_WINDOWS` windows."""

        def run(model: PreTrainedModel) -> None:
            for _ in losses_by_batch(model, self._text[:_FORWARD_WINDOWS]):
                pass

        return self._difference(run, self._running)

    def measuring(self) -> _Work:
        """Measuring `samples`."""

        def run(model: PreTrainedModel) -> None:
            own = build_structure(model, self._config.head_granularity)
            text = self._text[: self.samples]
            measure(model, own, text, self.samples, terms=self._config.terms, layer_wise=self._layer_wise)

        return self._difference(run, self._models)

    def moments(self) -> tuple[float, float]:
        """Of one layer: summing those of one window, and what is done with them once."""

        def run(count: int) -> None:
            for _ in measure_moments(self._running[0], self._structure, self._text[:count]):
                pass

        run(2)
        short, long = (_seconds(partial(run, count)) / self._structure.layers for count in _MOMENTS_WINDOWS)
        window = max(0.0, long - short) / (_MOMENTS_WINDOWS[1] - _MOMENTS_WINDOWS[0])
        return window, max(0.0, short - window * _MOMENTS_WINDOWS[0])

    def removals(self) -> float:
        """Comparing the removals of one layer."""
        moments = {
            number: _any_moments(block.groups * block.row_wise.width, self._smallest.device)
            for number, block in enumerate(self._structure.blocks)
        }
        return _seconds(partial(removal_errors, self._smallest, self._structure, moments)) / self._structure.layers

    def compensation(self, cut: _Cut) -> float:
        """Compensating all blocks that are cut, by what one of each kind takes."""
        total = 0.0
        for kind in ("heads", "channels"):
            numbers = [index for index in cut.blocks if cut.structure.blocks[index].kind == kind]
            if numbers:
                row_wise = next(block for block in self._structure.blocks if block.kind == kind).row_wise
                weight = row_wise.as_projection(self._smallest.get_parameter(row_wise.parameter).detach())
                moments = _any_moments(weight.shape[1], weight.device)
                kept = torch.arange(sum(cut.counts[index] for index in numbers) // len(numbers) * row_wise.width)
                total += len(numbers) * _seconds(partial(compensate, weight, moments, kept, "least-squares"))
        return total

    def _difference(self, work: Callable[[PreTrainedModel], object], models: list[PreTrainedModel]) -> _Work:
        few, some = _LAYERS[self._layer_wise]
        short, long = (_seconds(partial(work, model)) for model in models)
        layer = max(0.0, long - short) / (some - few)
        return _Work(max(0.0, short - few * layer), layer)


def _random_model(config: PreTrainedConfig, layers: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    model = shortened_model(config, layers, device, dtype)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    for buffer in model.buffers():
        buffer.fill_(1.0) if buffer.is_floating_point() else buffer.zero_()
    return model


def _any_moments(inputs: int, device: torch.device) -> InputMoments:
    return InputMoments(torch.zeros(inputs, device=device), torch.eye(inputs, device=device), 1.0)


def _seconds(work: Callable[[], object]) -> float:
    """The median of three, after a first time that does not count unless it was long."""
    times: list[float] = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        if times[0] > _LONG:
            return times[0]
    return sorted(times[1:])[1]
