"""The given model and where it runs, which texts are used for what, and how much is removed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration import BlendPart, Source, fingerprint, read_pictures
from adapruner.config import Layout, PruneConfig, RatioOf
from adapruner.costs import (
    Latencies,
    check_latencies,
    describe_measuring,
    is_gguf,
    layers_to_measure,
    measure_latencies,
    measured_model,
    read_latencies,
    target_of,
    timer,
    timings,
)
from adapruner.errors import AdaPrunerError
from adapruner.families import open_config, resolve
from adapruner.gguf import check_gguf
from adapruner.memory import Placement, choose_placement, dtype_of_weights, estimate_memory, room_for_moments
from adapruner.models import (
    Architecture,
    ModelLocation,
    Pictures,
    check_length,
    check_streamable,
    copy_in_dtype,
    empty_model,
    find_model,
    find_wrapper,
    fingerprint as fingerprint_of_model,
    is_pruned,
    is_streamable,
    load_config,
    load_model,
    load_tokenizer,
    resolve_devices,
    show_pictures,
    trial_dtype,
    usable_devices,
)
from adapruner.planning import (
    Amount,
    Budget,
    Speed,
    Target,
    UnreachableRatioError,
    amount_of,
    default_budget,
    kept_counts,
    make_plan,
)
from adapruner.planning._amount import TIMED_TOKENS
from adapruner.progress import Reporter
from adapruner.recovery import check_optimizer
from adapruner.run.nodes.declared import GRAPH
from adapruner.run.nodes.forms import json_form
from adapruner.structure import Structure, build_structure, count_parameters
from adapruner.surgery import prune_model
from adapruner.texts import Texts, assign_texts
from adapruner.tokens import (
    TokenizerParts,
    Vocabulary,
    configs_with_tokens,
    cut_config,
    cut_tokenizer,
    cut_vocabulary,
    select_vocabulary,
)


class Precision(NamedTuple):
    """The dtypes in which a run computes.

    Attributes:
        asked: as the options name that of the weights.
        weights: in which the model is loaded, cut and saved.
        trials: in which candidates are judged.
        device: the type of the device.
    """

    asked: str
    weights: torch.dtype
    trials: torch.dtype
    device: str


def content_of_text(source: Source | None) -> dict[str, str | None] | None:
    """The content of a leaf for a text; that of the text itself is None where it is not at hand."""
    if source is None:
        return None
    columns = f":{source.columns}" if source.columns else ""
    return {"text": f"{source.identity}{columns}@{source.part}", "content": fingerprint(source)}


# The model as it was given


def content_of_model(location: ModelLocation) -> Any:
    """The content of a leaf for a model; the commit of one on the Hub is known once its config is read."""
    load_config(location)
    return fingerprint_of_model(location)


@GRAPH.leaf(content_of_model, "model")
def location(model: str) -> ModelLocation:
    return find_model(model)


@GRAPH.in_memory
def given_config(location: ModelLocation) -> PreTrainedConfig:
    """The config of the given model, with all of its tokens."""
    return open_config(location)


@GRAPH.leaf(lambda family: family.model_dump_json())
def family(given_config: PreTrainedConfig) -> Architecture:
    return resolve(given_config)


@GRAPH.in_memory
def given_tokenizer(location: ModelLocation) -> Tokenizer:
    """The tokenizer of the given model, with all of its tokens."""
    return load_tokenizer(location)


# Which text is used for what


@GRAPH.leaf()
def texts(config: PruneConfig) -> Texts:
    return assign_texts(config, missing_ok=True)


@GRAPH.leaf(content_of_text)
def pool_text(texts: Texts) -> Source | None:
    return texts.pool


@GRAPH.leaf(content_of_text)
def objective_text(texts: Texts) -> Source | None:
    return texts.objective


@GRAPH.leaf(lambda blend: [[part.is_written, part.share, content_of_text(part.source)] for part in blend])
def recovery_texts(texts: Texts) -> tuple[BlendPart, ...]:
    return texts.recovery


@GRAPH.leaf(lambda sources: {name: content_of_text(source) for name, source in sources.items()})
def evaluated_texts(texts: Texts) -> dict[str, Source]:
    return texts.report


@GRAPH.leaf(lambda sources: {str(source): content_of_text(source) for source in sources})
def counted_texts(texts: Texts) -> tuple[Source, ...]:
    return texts.vocabulary


# The tokens that are kept, and the model with these alone


@GRAPH.kept("vocabulary.json", json_form(Vocabulary), is_wanted=lambda vocabulary: bool(vocabulary), is_early=True)
def kept_tokens(
    location: ModelLocation,
    given_config: PreTrainedConfig,
    given_tokenizer: Tokenizer,
    counted_texts: tuple[Source, ...],
    vocabulary_size: int | None,
    vocabulary_multiple: int,
    reporter: Reporter,
) -> Vocabulary:
    """The tokens that are kept. Everything from here on is of the model and the tokenizer with these alone."""
    naming = configs_with_tokens(location, given_config)
    with reporter.stage("counting tokens", None) as advance:
        return select_vocabulary(
            given_tokenizer, given_config, naming, counted_texts, vocabulary_size, vocabulary_multiple, advance
        )


@GRAPH.in_memory
def tokenizer(given_tokenizer: Tokenizer, kept_tokens: Vocabulary | None) -> Tokenizer:
    if kept_tokens is None:
        return given_tokenizer
    return cut_tokenizer(given_tokenizer, TokenizerParts.of(given_tokenizer), kept_tokens.new_ids)


@GRAPH.in_memory
def empty(given_config: PreTrainedConfig, kept_tokens: Vocabulary | None) -> PreTrainedModel:
    """The dense model without weights."""
    return empty_model(cut_config(given_config, kept_tokens) if kept_tokens else given_config)


@GRAPH.in_memory
def structure(
    empty: PreTrainedModel, family: Architecture, head_granularity: Any, expert_granularity: Any
) -> Structure:
    return build_structure(empty, head_granularity, expert_granularity)


# Where it runs


@GRAPH.leaf()
def main_device(device: str) -> torch.device:
    """The device of the model; of several, the first."""
    return resolve_devices(device)[0]


@GRAPH.leaf(lambda it: {"dtype": str(it.weights), "dtype of trials": str(it.trials), "device": it.device})
def precision(empty: PreTrainedModel, dtype: Any, main_device: torch.device) -> Precision:
    weights = dtype_of_weights(empty, dtype)
    return Precision(dtype, weights, trial_dtype(weights, main_device), main_device.type)


# How much is removed

RatioOfBlocks = Callable[[float], float]
BudgetAt = Callable[[float], Budget]


@GRAPH.in_memory
def share_of_decoder(location: ModelLocation, given_config: PreTrainedConfig) -> float:
    """The share of the parameters of a multimodal model that its decoder has; 1 for a text model."""
    wrapper = find_wrapper(location)
    if wrapper is None:
        return 1
    return count_parameters(empty_model(given_config)) / count_parameters(wrapper.around(given_config))


@GRAPH.in_memory
def ratio_of_blocks(kept_tokens: Vocabulary | None, share_of_decoder: float, ratio_of: RatioOf) -> RatioOfBlocks:
    """For a ratio of all parameters of the given model, that of the remaining ones that blocks must lose."""

    def rest(ratio: float) -> float:
        if ratio_of == "parameters" and ratio >= share_of_decoder:
            raise UnreachableRatioError(
                f"`ratio` {ratio} is not reachable: the decoder, which alone is pruned, has {share_of_decoder:.3f} of"
                " the parameters"
            )
        if ratio_of == "parameters":
            ratio = ratio / share_of_decoder
        if kept_tokens is None or ratio_of == "groups":
            return ratio
        summary = kept_tokens.summary
        left = ratio * summary.parameters_before - summary.removed_parameters
        if left <= 0:
            share = summary.removed_parameters / summary.parameters_before
            raise AdaPrunerError(
                f"`ratio` {ratio} is less than what the vocabulary alone gives, {share:.3f} of the"
                f" {summary.parameters_before:,} parameters: choose a larger ratio, or a larger `vocabulary_size`;"
                " adapruner vocabulary removes tokens and nothing else"
            )
        return left / summary.parameters_after

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


@GRAPH.in_memory
def aim(
    target_size: str | None,
    target_memory: str | None,
    target_speed: float | None,
    target_format: Any,
    target_phase: Any,
    target_batch: int,
    target_context: int | None,
) -> Amount | None:
    """The size, memory or speed that replaces the ratio, as the options say."""
    target = target_size, target_memory, target_speed
    return amount_of(*target, target_format, target_phase, target_batch, target_context)


@GRAPH.in_memory
def target(
    empty: PreTrainedModel,
    structure: Structure,
    precision: Precision,
    tokenizer_later: Callable[[], Tokenizer],
    latencies: Latencies | None,
    aim: Amount | None,
) -> Target | None:
    """The cost that replaces the ratio, with what computes it."""
    if aim is None:
        return None
    return target_of(aim, empty, structure, precision.weights, tokenizer_later(), latencies)


@GRAPH.in_memory
def ratio_of_target(
    target: Target | None,
    empty: PreTrainedModel,
    structure: Structure,
    budget_at: BudgetAt,
    kept_tokens: Vocabulary | None,
) -> float | None:
    """The ratio that the search starts with to meet a target; None without one.

    Raises:
        AdaPrunerError: it cannot be met, or what meets it cannot be written in the format; with the numbers.
    """
    if target is None:
        return None

    def counts_at(ratio: float) -> list[int]:
        return kept_counts(structure, budget_at(ratio))

    summary = kept_tokens.summary if kept_tokens else None
    ratio = target.ratio(counts_at, summary.removed_parameters / summary.parameters_before if summary else 0.0)
    if not isinstance(target.amount, Speed) and is_gguf(target.amount.format):
        scores = torch.zeros(structure.group_offsets[-1])
        check_gguf(prune_model(empty, structure, make_plan(structure, scores, counts_at(ratio))))
    return ratio


@GRAPH.in_memory
def starting_budget(budget_at: BudgetAt, ratio_of_target: float | None, ratio: float) -> Budget:
    """The budget that the search starts from."""
    return budget_at(ratio if ratio_of_target is None else ratio_of_target)


# Where the model is in memory


@GRAPH.leaf()
def largest_budget(budget_at: BudgetAt, ratio_of_target: float | None, largest_ratio_asked: float) -> Budget:
    """The budget of the largest of several ratios: the placement of the model is the same for all."""
    return budget_at(largest_ratio_asked if ratio_of_target is None else ratio_of_target)


@GRAPH.leaf(lambda placement: {"layer_wise": placement.layer_wise})
def placement(
    config: PruneConfig,
    location: ModelLocation,
    empty: PreTrainedModel,
    structure: Structure,
    largest_budget: Budget,
    device: str,
    layer_wise: bool | None,
    target_speed: float | None,
) -> Placement:
    """The devices of the layers. How much memory is free decides only whether the run is refused."""
    check_length(empty.config, max(config.seq_len, config.recovery.seq_len if config.recover else 0))
    if config.recover:
        check_optimizer(config.recovery.optimizer)
    if layer_wise:
        check_streamable(location, empty.config)
    streamable = is_streamable(location, empty.config)
    chosen = choose_placement(config, empty, structure, largest_budget, usable_devices(device), streamable)
    if target_speed and not chosen.on_one_device:
        where = "in memory one at a time" if chosen.layer_wise else "on several devices"
        raise AdaPrunerError(
            f"`target_speed` is measured with all layers on one device, and here they are {where}: give a `ratio`"
        )
    return chosen


RoomFor = Callable[[str], dict[torch.device, int]]


@GRAPH.leaf()
def room_for(
    config: PruneConfig,
    empty: PreTrainedModel,
    structure: Structure,
    largest_budget: Budget,
    main_device: torch.device,
    placement: Placement,
) -> RoomFor:
    """For a stage, the bytes that second moments may take on each device meanwhile; none where that cannot be told."""

    def room(stage: str) -> dict[torch.device, int]:
        if is_pruned(empty.config):
            return {}
        about = config, empty, structure, largest_budget, main_device, placement.layer_wise, len(placement.devices)
        return room_for_moments(main_device, estimate_memory(*about)[stage])

    return room


@GRAPH.leaf()
def is_mapped(location: ModelLocation) -> bool:
    """True if weights are mapped from files, which takes no time and no memory of their own."""
    return location.gguf_file is None


@GRAPH.leaf()
def pictures(texts: Texts) -> list[Pictures]:
    """The image features in all texts, which the windows of these stand for."""
    sources = [*(source for _, source in texts.used), *texts.report.values()]
    files = {source.identity: source for source in sources}
    return [table for source in files.values() if (table := read_pictures(source))]


@partial(GRAPH.costly, is_read_again_if="is_mapped")
def dense(
    location: ModelLocation,
    pictures: list[Pictures],
    precision: Precision,
    placement: Placement,
    kept_tokens: Vocabulary | None,
    reporter: Reporter,
) -> PreTrainedModel:
    """The dense model with the tokens that are kept."""
    with reporter.stage("loading"):
        model = load_model(location, precision.asked, placement.device, placement.layer_wise)
        if kept_tokens:
            cut_vocabulary(model, kept_tokens)
    return show_pictures(model, pictures)


@GRAPH.costly
def dense_fast(dense: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """The same in the dtype of trials."""
    return dense if precision.trials == dense.dtype else copy_in_dtype(dense, precision.trials)
