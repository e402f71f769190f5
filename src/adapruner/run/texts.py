"""The text of a run: windows of tokens for every use."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.base.progress import Reporter
from adapruner.evaluation.losses import finite_windows
from adapruner.graph.nodes import Form
from adapruner.importance import needs_moments
from adapruner.model.architecture import check_length, check_tokens
from adapruner.model.generation import end_tokens
from adapruner.option_rules import FEWEST_JUDGING_WINDOWS, searches
from adapruner.options import Searched, Space, Terms
from adapruner.run.graph import Windows
from adapruner.run.inputs import GRAPH as GRAPH
from adapruner.text.blends import BlendPart, counts_of, sources_of
from adapruner.text.sources import Part, Source
from adapruner.text.uses import DEFAULT_REPORT_WINDOWS
from adapruner.text.windows import (
    EvaluationText,
    Text,
    draw_windows,
    evaluation_text,
    evenly_spaced,
    load_texts,
    load_texts_by_use,
    save_texts,
    save_texts_by_use,
    text_windows,
)
from adapruner.text.written import write_kinds

# On which healing is judged.
HELD_OUT_TO_HEAL = 14

TEXTS: Form[dict[str, Text]] = Form(save_texts_by_use, load_texts_by_use)


@GRAPH.leaf(lambda is_searched: is_searched, title="search")
def is_searched(trials: int | None, space: Space, search: Searched) -> bool:
    """True if there is a search; more trials need no other text."""
    return searches(trials, space, search)


@GRAPH.in_memory
def window_counts(
    calibration_texts: tuple[BlendPart, ...],
    objective_texts: tuple[BlendPart, ...],
    pool: int,
    objective_windows: int,
    compensation_windows: int,
    compensation: str,
    space: Space,
    terms: Terms,
    is_searched: bool,
) -> dict[str, dict[str, int]]:
    """The number of windows of each kind for each use. Only a search has a pool and an objective."""
    counts = {}
    if is_searched:
        counts = {
            "pool": counts_of(calibration_texts, pool),
            "objective": counts_of(objective_texts, objective_windows),
        }
    if needs_moments(compensation, space, terms):
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


@GRAPH.kept("windows.safetensors", TEXTS, version=5)
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
    evaluate_windows: int | None,
    evaluate_bos: bool,
) -> dict[str, EvaluationText]:
    """The windows that are reported on, by the name of their text."""
    count = evaluate_windows or (None if evaluate else DEFAULT_REPORT_WINDOWS)
    texts = {
        name: evaluation_text(source, tokenizer, seq_len, count, bos=evaluate_bos)
        for name, source in evaluated_texts.items()
    }
    for text in texts.values():
        check_tokens(empty.config, int(text.windows.max()))
    return texts


@GRAPH.kept("evaluation/texts.safetensors", Form(save_texts, load_texts))
def report_texts(drawn_to_report: dict[str, EvaluationText]) -> dict[str, EvaluationText]:
    """The windows that perplexity is reported on, by the name of their text; kept, so that no text is needed later."""
    return drawn_to_report


@GRAPH.in_memory
def text_to_learn(windows: dict[str, Text]) -> tuple[Text, Text]:
    """The text that the pruned model is fitted and trained on, and the text on which the training is judged, which is
    not fitted either."""
    return windows["compensation" if "compensation" in windows else "pool"].held_out(HELD_OUT_TO_HEAL)
