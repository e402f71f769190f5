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
    few, some = (_random_model(model_config, layers, device, dtype) for layers in _LAYERS[layer_wise])
    layers, running = structure.layers, [in_fastest_dtype(few), in_fastest_dtype(some)]
    samples = MEASURED_AT_ONCE[layer_wise]
    embeddings: Any = few.get_input_embeddings()
    text = torch.randint(0, embeddings.weight.shape[0], (max(_MOMENTS_WINDOWS), config.seq_len))

    def run_forward(model: PreTrainedModel) -> None:
        for _ in losses_by_batch(model, text[:16]):
            pass

    def run_measuring(model: PreTrainedModel) -> None:
        own = build_structure(model, config.head_granularity)
        measure(model, own, text[:samples], samples, terms=config.terms, layer_wise=layer_wise)

    forward, measured = (
        _difference(work, models, _LAYERS[layer_wise])
        for work, models in ((run_forward, running), (run_measuring, [few, some]))
    )
    seconds = {"measuring": measured.of(layers) * config.pool / samples}

    own = build_structure(few, config.head_granularity)

    def run_moments(count: int) -> None:
        for _ in measure_moments(running[0], own, text[:count]):
            pass

    run_moments(2)
    # Of one layer.
    short, long = (_seconds(partial(run_moments, count)) / own.layers for count in _MOMENTS_WINDOWS)
    per_window = max(0.0, long - short) / (_MOMENTS_WINDOWS[1] - _MOMENTS_WINDOWS[0])
    choosing = max(0.0, short - per_window * _MOMENTS_WINDOWS[0])
    if config.compensation != "none" or config.space == "extended":
        seconds["reading activations"] = layers * (per_window * config.compensation_windows + choosing)
    if config.space == "extended":
        moments = {
            number: _any_moments(block.groups * block.row_wise.width, device) for number, block in enumerate(own.blocks)
        }
        seconds["comparing removals"] = layers * _seconds(partial(removal_errors, few, own, moments)) / own.layers

    counts = kept_counts(structure, budget)
    cut = [index for index, block in enumerate(structure.blocks) if counts[index] < block.groups]
    solving = _compensation_seconds(few, own, structure, counts, cut) if config.compensation != "none" else 0.0
    first, last = structure.blocks[min(cut)].layer, structure.blocks[max(cut)].layer
    of_layers = [_kept_share(structure, counts, layer) for layer in range(layers)]
    # The dense model reads everything once. Layers in front of the first that is cut are known then, and what stays of
    # the others is what is computed.
    batches = [windows / 16 for windows in (config.objective_windows, config.final_windows)]
    trial, finalist = (solving + forward.of(sum(of_layers[first:])) * each for each in batches)
    seconds["searching"] = forward.of(layers + first) * sum(batches) + config.trials * trial
    if config.final_windows:
        seconds["searching"] += _FINALISTS * finalist
    if config.fits_sequentially:
        summing = max(0.0, per_window - forward.layer / 16)
        # Both models up to the last layer that is cut, the pruned one from the first on.
        run = last + 1 + sum(of_layers[first + 1 : last + 1])
        seconds["compensating"] = solving + config.compensation_windows * (
            run * forward.layer / 16 + len(cut) * summing
        )
    order = ("reading activations", "measuring", "comparing removals", "searching", "compensating")
    return {stage: seconds[stage] for stage in order if stage in seconds}


def _random_model(config: PreTrainedConfig, layers: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    model = shortened_model(config, layers, device, dtype)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    for buffer in model.buffers():
        buffer.fill_(1.0) if buffer.is_floating_point() else buffer.zero_()
    return model


def _kept_share(structure: Structure, counts: list[int], layer: int) -> float:
    """What stays of the parameters of a layer."""
    own = [(block, count) for block, count in zip(structure.blocks, counts, strict=True) if block.layer == layer]
    whole = sum(block.groups * block.parameters_per_group for block, _ in own)
    return sum(count * block.parameters_per_group for block, count in own) / whole


def _compensation_seconds(
    few: PreTrainedModel, own: Structure, structure: Structure, counts: list[int], cut: list[int]
) -> float:
    """Of all blocks that are cut, by what one of each kind takes."""
    total = 0.0
    for kind in ("heads", "channels"):
        numbers = [index for index in cut if structure.blocks[index].kind == kind]
        if numbers:
            block = next(block for block in own.blocks if block.kind == kind)
            weight = block.row_wise.as_projection(few.get_parameter(block.row_wise.parameter).detach())
            inputs = weight.shape[1]
            width = block.row_wise.width
            kept = torch.arange(sum(counts[index] for index in numbers) // len(numbers) * width)
            work = partial(compensate, weight, _any_moments(inputs, weight.device), kept, "least-squares")
            total += len(numbers) * _seconds(work)
    return total


def _any_moments(inputs: int, device: torch.device) -> InputMoments:
    return InputMoments(torch.zeros(inputs, device=device), torch.eye(inputs, device=device), 1.0)


def _difference(
    work: Callable[[PreTrainedModel], object], models: list[PreTrainedModel], layers: tuple[int, int]
) -> _Work:
    short, long = (_seconds(partial(work, model)) for model in models)
    layer = max(0.0, long - short) / (layers[1] - layers[0])
    return _Work(max(0.0, short - layers[0] * layer), layer)


def _seconds(work: Callable[[], object]) -> float:
    """The median of three, after a first time that does not count unless it was long."""
    times: list[float] = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
        if times[0] > _LONG:
            return times[0]
    return sorted(times[1:])[1]
