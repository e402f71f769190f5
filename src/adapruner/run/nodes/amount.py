"""How much is removed: a ratio, or a size, memory or speed that replaces it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.config import Layout, RatioOf
from adapruner.costs import (
    Latencies,
    cache_bytes,
    check_latencies,
    describe_measuring,
    dtype_in,
    is_gguf,
    layers_to_measure,
    measure_latencies,
    measured_model,
    memory_costs,
    read_latencies,
    size_costs,
    timer,
    timings,
)
from adapruner.errors import AdaPrunerError
from adapruner.gguf import check_gguf
from adapruner.models import Architecture, ModelLocation, empty_model, find_wrapper
from adapruner.planning import (
    Amount,
    Budget,
    Memory,
    Speed,
    Target,
    UnreachableRatioError,
    default_budget,
    kept_counts,
    make_plan,
    requested_amount,
)
from adapruner.planning._amount import TIMED_TOKENS
from adapruner.progress import Reporter
from adapruner.run.nodes.declared import GRAPH
from adapruner.run.nodes.forms import json_form
from adapruner.run.nodes.inputs import Precision
from adapruner.structure import Structure, count_parameters
from adapruner.surgery import prune_model

RatioOfBlocks = Callable[[float], float]
BudgetAt = Callable[[float], Budget]


@GRAPH.in_memory
def share_of_decoder(location: ModelLocation, model_config: PreTrainedConfig) -> float:
    """The share of the parameters of a multimodal model that its decoder has; 1 for a text model."""
    wrapper = find_wrapper(location)
    if wrapper is None:
        return 1
    return count_parameters(empty_model(model_config)) / count_parameters(wrapper.around(model_config))


@GRAPH.in_memory
def ratio_of_blocks(share_of_decoder: float, ratio_of: RatioOf) -> RatioOfBlocks:
    """For a ratio of all parameters of the given model, that of the remaining ones that blocks must lose."""

    def rest(ratio: float) -> float:
        if ratio_of == "parameters" and ratio >= share_of_decoder:
            raise UnreachableRatioError(
                f"`ratio` {ratio} is not reachable: the decoder, which alone is pruned, has {share_of_decoder:.3f} of"
                " the parameters"
            )
        return ratio / share_of_decoder if ratio_of == "parameters" else ratio

    return rest


@GRAPH.in_memory
def budget_at(
    structure: Structure,
    family: Architecture,
    ratio_of_blocks: RatioOfBlocks,
    layout: Layout,
    ratio_of: RatioOf,
    round_to: int,
    protect_first: int | None,
    protect_last: int | None,
    head_share: float | None,
) -> BudgetAt:
    """For a ratio of all parameters, the budget that the search starts from."""
    if layout not in family.layouts:
        raise AdaPrunerError(
            f"the layers of a {family.model_type} cannot be cut differently: set `layout` to {family.layouts[0]}"
        )
    options = layout, ratio_of, round_to, protect_first, protect_last, head_share
    return lambda ratio: default_budget(structure, ratio_of_blocks(ratio), *options)


@GRAPH.kept(
    "latencies.json",
    json_form(Latencies),
    is_wanted=lambda target_speed: target_speed is not None,
    is_result=True,
    is_early=True,
)
def latencies(
    empty: PreTrainedModel,
    structure: Structure,
    precision: Precision,
    main_device: torch.device,
    target_phase: Any,
    target_batch: int,
    target_context: int | None,
    reporter: Reporter,
) -> Latencies:
    """The times of layers on this machine, as this user has measured them before, or measured now."""
    check_latencies(structure)
    model, context = empty.config, target_context or TIMED_TOKENS
    about = describe_measuring(model, precision.weights, main_device, target_phase, target_batch, context)

    def measure() -> Latencies:
        layers = layers_to_measure(structure, precision.weights)
        with reporter.stage("timing layers", timings(structure)) as advance:
            make = partial(measured_model, model, dtype=precision.weights, device=main_device)
            time = timer(target_phase, target_batch, context)
            return measure_latencies(structure, make, layers, time, about, advance)

    return read_latencies(about, measure)


GRAPH.in_memory(requested_amount)


@GRAPH.in_memory
def target(
    empty: PreTrainedModel,
    structure: Structure,
    precision: Precision,
    tokenizer_later: Callable[[], Tokenizer],
    latencies: Latencies | None,
    requested_amount: Amount | None,
) -> Target | None:
    """The cost that replaces the ratio, with what computes it.

    Raises:
        AdaPrunerError: the model cannot be written in the format.
    """
    amount, dtype = requested_amount, precision.weights
    if amount is None:
        return None
    if isinstance(amount, Speed):
        assert latencies is not None
        costs = latencies.costs(structure)
    else:
        costs = size_costs(empty, structure, amount.format, dtype, tokenizer_later())
    if isinstance(amount, Memory):
        caches = cache_bytes(empty, amount.batch, amount.context, dtype_in(amount.format, dtype))
        costs = memory_costs(structure, costs, caches)
    return Target(amount, costs, costs([block.groups for block in structure.blocks]))


@GRAPH.in_memory
def ratio_of_target(
    target: Target | None,
    empty: PreTrainedModel,
    structure: Structure,
    budget_at: BudgetAt,
) -> float | None:
    """The ratio that the search starts with to meet a target; None without one.

    Raises:
        AdaPrunerError: it cannot be met, or what meets it cannot be written in the format; with the numbers.
    """
    if target is None:
        return None

    def counts_at(ratio: float) -> list[int]:
        return kept_counts(structure, budget_at(ratio))

    ratio = target.ratio(counts_at)
    if not isinstance(target.amount, Speed) and is_gguf(target.amount.format):
        scores = torch.zeros(structure.group_offsets[-1])
        check_gguf(prune_model(empty, structure, make_plan(structure, scores, counts_at(ratio))))
    return ratio


@GRAPH.in_memory
def starting_ratio(ratio_of_target: float | None, ratio: float) -> float:
    """The ratio that is asked for, or that the search starts with to meet a target."""
    return ratio if ratio_of_target is None else ratio_of_target


@GRAPH.in_memory
def starting_budget(budget_at: BudgetAt, starting_ratio: float) -> Budget:
    """The budget that the search starts from."""
    return budget_at(starting_ratio)
