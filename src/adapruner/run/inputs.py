"""The graph of a run, its given model and its text: windows of tokens for every use, and the budget.

The nodes are declared here, in `choice` and in `models`, in this order: each takes the graph from the module before.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.base.progress import Reporter
from adapruner.budget.counts import Budget, UnreachableRatioError, default_budget
from adapruner.evaluation.losses import finite_windows
from adapruner.families import open_config, resolve
from adapruner.graph.nodes import Form, Graph
from adapruner.importance import needs_moments
from adapruner.model.architecture import Architecture, check_length, check_tokens
from adapruner.model.config import find_wrapper, load_config
from adapruner.model.generation import end_tokens
from adapruner.model.loading import (
    check_streamable,
    copy_in_dtype,
    empty_model,
    is_streamable,
    load_model,
    load_tokenizer,
    resolve_devices,
    trial_dtype,
    usable_devices,
)
from adapruner.model.places import ModelLocation, find_model, fingerprint as fingerprint_of_model
from adapruner.options import (
    FEWEST_JUDGING_WINDOWS,
    TOKENS_MULTIPLE,
    Dtype,
    ExpertGranularity,
    HeadGranularity,
    Layout,
    PruneConfig,
    RatioOf,
    Space,
)
from adapruner.run.memory import Placement, choose_placement, dtype_of_weights, room_for_moments
from adapruner.structure.blocks import Structure, count_parameters
from adapruner.structure.build import build_structure
from adapruner.text.blends import DEFAULT_REPORT_WINDOWS, BlendPart, Texts, assign_texts, counts_of, sources_of
from adapruner.text.reading import fingerprint
from adapruner.text.sources import Part, Source, parse_source, source_names
from adapruner.text.windows import (
    EvaluationText,
    Text,
    draw_windows,
    evenly_spaced,
    load_texts,
    load_texts_by_use,
    save_texts,
    save_texts_by_use,
    text_windows,
    texts_to_report,
)
from adapruner.text.written import kinds, write_kinds
from adapruner.tokens.model import FewerTokens, fewer_tokens
from adapruner.tokens.tokenizer import cut_tokenizer

Windows = dict[str, Tensor]
TENSORS: Form[Windows] = Form(save_file, load_file)

GRAPH = Graph(PruneConfig, given=("reporter", "run_folder", "stage_costs"), unkeyed=("config",))


def json_form(content: Any) -> Form[Any]:
    """Values of a type that pydantic knows, as JSON."""
    adapter: TypeAdapter[object] = TypeAdapter(content)
    return Form(
        lambda value, path: path.write_bytes(adapter.dump_json(value, indent=2) + b"\n"),
        lambda path: adapter.validate_json(path.read_bytes()),
    )


# The model as it was given


def content_of_model(location: ModelLocation) -> object:
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
    empty: PreTrainedModel,
    family: Architecture,
    head_granularity: HeadGranularity,
    expert_granularity: ExpertGranularity,
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
    """The same for a blend; of text that the model writes, what that begins with."""
    if len(blend) == 1 and blend[0].source:
        return content_of_text(blend[0].source)
    contents = [content_of_text(part.source) if part.source else kinds()[part.name].fingerprint for part in blend]
    named = ", ".join(f"{part.source.dataset if part.source else part.name}:{part.share:.3g}" for part in blend)
    is_lost = any(isinstance(content, dict) and content["content"] is None for content in contents)
    return {"text": named, "content": None if is_lost else json.dumps([contents, [part.share for part in blend]])}


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


@GRAPH.leaf(lambda sources: {str(source): content_of_text(source) for source in sources}, title="vocabulary")
def vocabulary_texts(vocabulary: tuple[str, ...]) -> tuple[Source, ...]:
    """The text whose tokens are kept."""
    return tuple(parse_source(name, missing_ok=True) for name in source_names(vocabulary))


# How much is removed


@GRAPH.kept(
    "vocabulary.json", json_form(FewerTokens), is_wanted=lambda vocabulary: vocabulary, is_early=True, is_result=True
)
def tokens_left(
    vocabulary_texts: tuple[Source, ...],
    vocabulary_size: str | None,
    location: ModelLocation,
    model_config: PreTrainedConfig,
    tokenizer: Tokenizer,
    reporter: Reporter,
) -> FewerTokens:
    """The tokens that are kept. What is removed from the layers depends on their number."""
    size = int(vocabulary_size) if vocabulary_size else None
    with reporter.stage("counting tokens", None) as advance:
        return fewer_tokens(location, model_config, tokenizer, vocabulary_texts, size, TOKENS_MULTIPLE, advance)


@GRAPH.in_memory
def tokenizer_left(tokenizer: Tokenizer, tokens_left: FewerTokens | None) -> Tokenizer:
    """The tokenizer of the pruned model."""
    return cut_tokenizer(tokenizer, tokens_left.vocabulary.new_ids) if tokens_left else tokenizer


@GRAPH.in_memory
def share_of_decoder(location: ModelLocation, model_config: PreTrainedConfig) -> float:
    """The share of the parameters of a multimodal model that its decoder has; 1 for a text model."""
    wrapper = find_wrapper(location)
    if wrapper is None:
        return 1
    return count_parameters(empty_model(model_config)) / count_parameters(wrapper.around(model_config))


@GRAPH.in_memory
def ratio_of_decoder(
    share_of_decoder: float, ratio: float, ratio_of: RatioOf, tokens_left: FewerTokens | None
) -> float:
    """The share of the parameters of the decoder, or of its groups, that is removed from its layers."""
    share = share_of_decoder if ratio_of == "parameters" else 1.0
    if ratio >= share:
        raise UnreachableRatioError(
            f"`ratio` {ratio} is not reachable: the decoder, all that is pruned, has {share_of_decoder:.3f} of all"
        )
    of_tokens = tokens_left.summary.removed_share if tokens_left else 0.0
    if ratio / share <= of_tokens:
        raise AdaPrunerError(
            f"`ratio` {ratio}: fewer tokens alone remove {of_tokens * share:.3f} of all parameters. Raise `ratio`, or"
            " keep more tokens by a larger `vocabulary_size`"
        )
    return ratio / share - of_tokens


@GRAPH.in_memory
def starting_budget(
    structure: Structure,
    family: Architecture,
    ratio_of_decoder: float,
    layout: Layout,
    ratio_of: RatioOf,
    round_to: int,
    protect_first: float | None,
    protect_last: float | None,
    head_share: float | None,
    tensor_parallel: int,
) -> Budget:
    """The budget that the search starts from."""
    if layout not in family.layouts:
        raise AdaPrunerError(
            f"the layers of a {family.model_type} cannot be cut differently: set `layout` to {family.layouts[0]}"
        )
    options = layout, ratio_of, round_to, protect_first, protect_last, head_share, tensor_parallel
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
def precision(empty: PreTrainedModel, dtype: Dtype, main_device: torch.device) -> Precision:
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
    streamable, devices = is_streamable(location, empty.config), usable_devices(config.device)
    return choose_placement(config, empty, structure, starting_budget, devices, streamable, location=location)


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


# On which healing is judged.
HELD_OUT_TO_HEAL = 14

TEXTS: Form[dict[str, Text]] = Form(save_texts_by_use, load_texts_by_use)


@GRAPH.leaf(lambda is_searched: is_searched, title="search")
def is_searched(trials: int) -> bool:
    """True if there is a search; more trials need no other text."""
    return trials > 0


@GRAPH.in_memory
def window_counts(
    calibration_texts: tuple[BlendPart, ...],
    objective_texts: tuple[BlendPart, ...],
    pool: int,
    objective_windows: int,
    compensation_windows: int,
    compensation: str,
    space: Space,
    is_searched: bool,
) -> dict[str, dict[str, int]]:
    """The number of windows of each kind for each use. Only a search has a pool and an objective."""
    counts = {}
    if is_searched:
        counts["pool"] = counts_of(calibration_texts, pool)
        counts["objective"] = counts_of(objective_texts, objective_windows)
    if needs_moments(compensation, space):
        counts["compensation"] = counts_of(calibration_texts, compensation_windows)
    return counts


@GRAPH.in_memory
def drawn(
    calibration_texts: tuple[BlendPart, ...],
    objective_texts: tuple[BlendPart, ...],
    tokenizer: Tokenizer,
    empty: PreTrainedModel,
    window_counts: dict[str, dict[str, int]],
    objective_windows: int,
    seq_len: int,
    seed: int,
) -> dict[str, Windows]:
    """The windows out of datasets by use and kind, [windows, tokens] each, int64; without those that the model
    writes."""
    fewest = {
        "pool": window_counts.get("pool", {}),
        "objective": counts_of(objective_texts, min(objective_windows, FEWEST_JUDGING_WINDOWS)),
    }
    drawn: dict[str, Windows] = {use: {} for use in window_counts}
    for use, blend in (("pool", calibration_texts), ("objective", objective_texts)):
        for kind, source in sources_of(blend) if use in window_counts else ():
            if count := window_counts[use][kind]:
                drawn[use][kind] = draw_windows(source, tokenizer, count, seq_len, seed, fewest[use][kind])
    for kind, source in sources_of(calibration_texts) if "compensation" in window_counts else ():
        text = text_windows(source, tokenizer, seq_len)
        drawn["compensation"][kind] = evenly_spaced(text, window_counts["compensation"][kind])
        if len(text) < 2:
            raise AdaPrunerError(f"{source} gives one window of {seq_len} tokens, compensation needs 2")
    for tokens in (tokens for by_kind in drawn.values() for tokens in by_kind.values() if len(tokens)):
        check_tokens(empty.config, int(tokens.max()))
    return drawn


@GRAPH.kept("windows.safetensors", TEXTS, version=6)
def windows(
    dense_fast: PreTrainedModel,
    tokenizer: Tokenizer,
    calibration_texts: tuple[BlendPart, ...],
    objective_texts: tuple[BlendPart, ...],
    drawn: dict[str, Windows],
    window_counts: dict[str, dict[str, int]],
    empty: PreTrainedModel,
    samples: int,
    seq_len: int,
    seed: int,
    reporter: Reporter,
) -> dict[str, Text]:
    """The text of every use, on which the loss of the dense model is finite. What the model writes for the pool is
    part of what it writes for compensation."""
    reporter.note(check_length(empty.config, seq_len) or "")
    windows = {use: dict(by_kind) for use, by_kind in drawn.items()}
    parts: tuple[tuple[Part, tuple[BlendPart, ...], tuple[str, ...]], ...] = (
        ("calibration", calibration_texts, ("pool", "compensation")),
        ("objective", objective_texts, ("objective",)),
    )
    for of_text, blend, uses in parts:
        counts = {
            part.name: max((window_counts[use][part.name] for use in uses if use in windows), default=0)
            for part in blend
            if part.is_written
        }
        if not any(counts.values()):
            continue
        with reporter.stage("writing text", sum(counts.values())) as advance:
            ends = end_tokens(dense_fast, tokenizer)
            written = write_kinds(dense_fast, tokenizer, counts, seq_len, of_text, seed, ends, advance)
        for use in windows.keys() & {*uses}:
            windows[use] |= {kind: evenly_spaced(own, window_counts[use][kind]) for kind, own in written.items()}
    texts = {use: Text.mixed(by_kind) for use, by_kind in windows.items()}
    with reporter.stage("checking text"):
        least = {"pool": samples, "objective": 1, "compensation": 2}
        finite, note = finite_windows(dense_fast, {use: text.windows for use, text in texts.items()}, least)
    reporter.note(note)
    return {use: text.part(finite[use]) for use, text in texts.items()}


@GRAPH.in_memory
def drawn_to_report(
    evaluated_texts: dict[str, Source],
    tokenizer: Tokenizer,
    empty: PreTrainedModel,
    seq_len: int,
    evaluate: tuple[str, ...],
    limit: int | None,
    evaluate_bos: bool,
    vocabulary: tuple[str, ...],
) -> dict[str, EvaluationText]:
    """The windows that are reported on, by the name of their text."""
    count = limit or (None if evaluate else DEFAULT_REPORT_WINDOWS)
    positions, texts = getattr(empty.config, "max_position_embeddings", None), dict[str, EvaluationText]()
    if positions and vocabulary:  # spelt by fewer tokens, windows are longer
        positions //= 2
    for name, source in evaluated_texts.items():
        texts |= texts_to_report(source, tokenizer, seq_len, count, positions, evaluate_bos, name)
    for text in texts.values():
        check_tokens(empty.config, int(text.windows.max()))
    return texts


@GRAPH.kept("evaluation/texts.safetensors", Form(save_texts, load_texts), version=2)
def report_texts(drawn_to_report: dict[str, EvaluationText]) -> dict[str, EvaluationText]:
    """The windows that perplexity is reported on, by the name of their text; kept, so that no text is needed later."""
    return drawn_to_report


@GRAPH.in_memory
def text_to_learn(windows: dict[str, Text]) -> tuple[Text, Text]:
    """The text that the pruned model is fitted and trained on, and the text on which the training is judged, which is
    not fitted either."""
    return windows["compensation" if "compensation" in windows else "pool"].held_out(HELD_OUT_TO_HEAL)


# How often healing reads a text at most (research/experiments/healing.md).
MOST_READ = 2


def reads_more(heal: str, compensation: str, space: Space, compensation_windows: int, pool: int, seq_len: int) -> bool:
    """True if healing would read the text of the cut more often: that of compensation, or else the pool."""
    windows = compensation_windows if needs_moments(compensation, space) else pool
    return heal != "none" and int(heal) > MOST_READ * (windows - HELD_OUT_TO_HEAL) * seq_len


@GRAPH.kept("windows-to-heal.safetensors", TEXTS, is_wanted=reads_more)
def more_to_learn(
    dense_fast: PreTrainedModel,
    tokenizer: Tokenizer,
    calibration_texts: tuple[BlendPart, ...],
    text_to_learn: tuple[Text, Text],
    empty: PreTrainedModel,
    heal: str,
    seq_len: int,
    seed: int,
    reporter: Reporter,
) -> dict[str, Text]:
    """Further text to train on, with the kinds and shares of the first: what is left of datasets, and what the model
    writes; empty if nothing is left."""
    missing = math.ceil(int(heal) / (MOST_READ * seq_len)) - len(text_to_learn[0])
    counts = counts_of(calibration_texts, max(missing, len(calibration_texts)))
    # As bytes, one at a time: datasets may have millions of tokens.
    read = {window.numpy().tobytes() for text in text_to_learn for window in text.windows}
    further: Windows = {}
    for kind, source in sources_of(calibration_texts):
        windows = text_windows(source, tokenizer, seq_len)
        is_unread = torch.tensor([window.numpy().tobytes() not in read for window in windows], dtype=torch.bool)
        further[kind] = evenly_spaced(windows[is_unread], counts[kind])
        if len(further[kind]):
            check_tokens(empty.config, int(further[kind].max()))
    written = {part.name: counts[part.name] for part in calibration_texts if part.is_written and counts[part.name]}
    if written:
        with reporter.stage("writing more text", sum(written.values())) as advance:
            ends = end_tokens(dense_fast, tokenizer)
            further |= write_kinds(dense_fast, tokenizer, written, seq_len, "calibration", seed + 1, ends, advance)
    text = Text.mixed(further)
    if not len(text):
        return {"healing": text}
    finite, note = finite_windows(dense_fast, {"healing": text.windows}, {"healing": 0})
    reporter.note(note)
    return {"healing": text.part(finite["healing"])}
