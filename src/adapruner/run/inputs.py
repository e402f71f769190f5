"""The given model, which texts are used for what, the budget that the search starts from, and where the model is."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.base.progress import Reporter
from adapruner.budget.counts import Budget, UnreachableRatioError, default_budget
from adapruner.families import open_config, resolve
from adapruner.model.architecture import Architecture, check_length
from adapruner.model.config import find_wrapper, load_config
from adapruner.model.device import copy_in_dtype, resolve_devices, trial_dtype, usable_devices
from adapruner.model.loading import check_streamable, empty_model, is_streamable, load_model, load_tokenizer
from adapruner.model.places import ModelLocation, find_model, fingerprint as fingerprint_of_model
from adapruner.options import Layout, PruneConfig, RatioOf
from adapruner.run.graph import GRAPH as GRAPH
from adapruner.run.memory import Placement, choose_placement, dtype_of_weights, room_for_moments
from adapruner.structure.blocks import Structure, count_parameters
from adapruner.structure.build import build_structure
from adapruner.text.blends import BlendPart
from adapruner.text.reading import fingerprint
from adapruner.text.sources import Source
from adapruner.text.uses import Texts, assign_texts
from adapruner.text.written import kinds

# The model as it was given


def content_of_model(location: ModelLocation) -> Any:
    """The content of a leaf for a model; the commit of one on the Hub is known once its config is read."""
    load_config(location)
    return fingerprint_of_model(location)


@GRAPH.leaf(content_of_model, "model")
def location(model: str) -> ModelLocation:
    return find_model(model)


@GRAPH.in_memory
def model_config(location: ModelLocation) -> PreTrainedConfig:
    return open_config(location)


@GRAPH.leaf(lambda family: family.model_dump_json())
def family(model_config: PreTrainedConfig) -> Architecture:
    return resolve(model_config)


@GRAPH.in_memory
def tokenizer(location: ModelLocation) -> Tokenizer:
    return load_tokenizer(location)


@GRAPH.in_memory
def empty(model_config: PreTrainedConfig) -> PreTrainedModel:
    """The dense model without weights."""
    return empty_model(model_config)


@GRAPH.in_memory
def structure(
    empty: PreTrainedModel, family: Architecture, head_granularity: Any, expert_granularity: Any
) -> Structure:
    return build_structure(empty, head_granularity, expert_granularity)


# Which text is used for what


def content_of_text(source: Source) -> dict[str, str | None]:
    """The content of a leaf for a text; that of the text itself is None where it is not at hand. A file may move, and
    text in memory is a file of each run: its folder does not count."""
    columns = f":{source.columns}" if source.columns else ""
    identity = source.identity if source.hub else Path(source.identity).name
    return {"text": f"{identity}{columns}@{source.part}", "content": fingerprint(source)}


def content_of_blend(blend: tuple[BlendPart, ...]) -> dict[str, str | None]:
    """The content of a leaf for a blend; of text that the model writes, what that begins with."""
    if len(blend) == 1 and blend[0].source:
        return content_of_text(blend[0].source)
    contents = [content_of_text(part.source) if part.source else kinds()[part.name].fingerprint for part in blend]
    named = ", ".join(f"{part.source.dataset if part.source else part.name}:{part.share:.3g}" for part in blend)
    return {"text": named, "content": json.dumps([contents, [part.share for part in blend]])}


@GRAPH.leaf()
def texts(config: PruneConfig) -> Texts:
    return assign_texts(config)


@GRAPH.leaf(content_of_blend)
def calibration_texts(texts: Texts) -> tuple[BlendPart, ...]:
    return texts.calibration


@GRAPH.leaf(content_of_blend)
def objective_texts(texts: Texts) -> tuple[BlendPart, ...]:
    return texts.objective


@GRAPH.leaf(lambda sources: {name: content_of_text(source) for name, source in sources.items()})
def evaluated_texts(texts: Texts) -> dict[str, Source]:
    return texts.report


# How much is removed


@GRAPH.in_memory
def share_of_decoder(location: ModelLocation, model_config: PreTrainedConfig) -> float:
    """The share of the parameters of a multimodal model that its decoder has; 1 for a text model."""
    wrapper = find_wrapper(location)
    if wrapper is None:
        return 1
    return count_parameters(empty_model(model_config)) / count_parameters(wrapper.around(model_config))


@GRAPH.in_memory
def ratio_of_decoder(share_of_decoder: float, ratio: float, ratio_of: RatioOf) -> float:
    """The share of the parameters of the decoder, or of its groups, that is removed."""
    if ratio_of != "parameters":
        return ratio
    if ratio >= share_of_decoder:
        raise UnreachableRatioError(
            f"`ratio` {ratio} is not reachable: the decoder, which alone is pruned, has {share_of_decoder:.3f} of the"
            " parameters"
        )
    return ratio / share_of_decoder


@GRAPH.in_memory
def starting_budget(
    structure: Structure,
    family: Architecture,
    ratio_of_decoder: float,
    layout: Layout,
    ratio_of: RatioOf,
    round_to: int,
    protect_first: int | None,
    protect_last: int | None,
    head_share: float | None,
) -> Budget:
    """The budget that the search starts from."""
    if layout not in family.layouts:
        raise AdaPrunerError(
            f"the layers of a {family.model_type} cannot be cut differently: set `layout` to {family.layouts[0]}"
        )
    options = layout, ratio_of, round_to, protect_first, protect_last, head_share
    return default_budget(structure, ratio_of_decoder, *options)


# Where the dense model is, and in which dtype


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


@GRAPH.leaf()
def main_device(device: str) -> torch.device:
    """The device of the model; of several, the first."""
    return resolve_devices(device)[0]


@GRAPH.leaf(lambda it: {"dtype": str(it.weights), "dtype of trials": str(it.trials), "device": it.device})
def precision(empty: PreTrainedModel, dtype: Any, main_device: torch.device) -> Precision:
    weights = dtype_of_weights(empty, dtype)
    return Precision(dtype, weights, trial_dtype(weights, main_device), main_device.type)


@GRAPH.leaf()
def is_mapped(location: ModelLocation) -> bool:
    """True if weights are mapped from files, which takes no time and no memory of their own."""
    return location.gguf_file is None


@GRAPH.leaf(lambda placement: {"layer_wise": placement.layer_wise})
def placement(
    config: PruneConfig, location: ModelLocation, empty: PreTrainedModel, structure: Structure, starting_budget: Budget
) -> Placement:
    """The devices of the layers. How much memory is free decides only whether the run is refused."""
    check_length(empty.config, config.seq_len)
    if config.layer_wise:
        check_streamable(location, empty.config)
    streamable = is_streamable(location, empty.config)
    return choose_placement(config, empty, structure, starting_budget, usable_devices(config.device), streamable)


@GRAPH.leaf()
def memory_for_moments(placement: Placement) -> dict[torch.device, int]:
    """Bytes that second moments may occupy on each device; none where the memory of the run cannot be told."""
    return room_for_moments(placement.devices[0], placement.memory) if placement.memory else {}


@partial(GRAPH.costly, is_read_again_if="is_mapped")
def dense(location: ModelLocation, precision: Precision, placement: Placement, reporter: Reporter) -> PreTrainedModel:
    with reporter.stage("loading"):
        return load_model(location, precision.asked, placement.device, placement.layer_wise)


@GRAPH.costly
def dense_fast(dense: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """The same in the dtype of trials."""
    return dense if precision.trials == dense.dtype else copy_in_dtype(dense, precision.trials)
