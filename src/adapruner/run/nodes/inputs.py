"""The given model, where it runs, and which texts are used for what."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._blend import BlendPart
from adapruner.calibration._reading import fingerprint
from adapruner.calibration._sources import Source
from adapruner.config import PruneConfig
from adapruner.families import open_config, resolve
from adapruner.memory import dtype_of_weights
from adapruner.models._architecture import Architecture
from adapruner.models._config import load_config
from adapruner.models._device import resolve_devices, trial_dtype
from adapruner.models._fingerprint import fingerprint as fingerprint_of_model
from adapruner.models._loading import empty_model, load_tokenizer
from adapruner.models._places import ModelLocation, find_model
from adapruner.run.nodes.declared import GRAPH
from adapruner.structure._blocks import Structure
from adapruner.structure._build import build_structure
from adapruner.texts import Texts, assign_texts


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


# Where it runs


@GRAPH.leaf()
def main_device(device: str) -> torch.device:
    """The device of the model; of several, the first."""
    return resolve_devices(device)[0]


@GRAPH.leaf(lambda it: {"dtype": str(it.weights), "dtype of trials": str(it.trials), "device": it.device})
def precision(empty: PreTrainedModel, dtype: Any, main_device: torch.device) -> Precision:
    weights = dtype_of_weights(empty, dtype)
    return Precision(dtype, weights, trial_dtype(weights, main_device), main_device.type)
