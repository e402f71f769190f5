"""The text of a run: windows of tokens for every use."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._pool import (
    EvaluationText,
    draw_windows,
    evaluation_text,
    evenly_spaced,
    generate_windows,
    load_texts,
    save_texts,
    start_token,
    text_windows,
)
from adapruner.calibration._sources import Source
from adapruner.config import Space, Terms
from adapruner.errors import AdaPrunerError
from adapruner.evaluation._losses import finite_windows, window_losses
from adapruner.graph.records import Form
from adapruner.importance._terms import needs_moments
from adapruner.models._architecture import check_length, check_tokens
from adapruner.option_rules import scoring_bounds, written_count
from adapruner.progress import Reporter
from adapruner.run.nodes.declared import GRAPH, TENSORS, Windows
from adapruner.texts import DEFAULT_REPORT_WINDOWS

# What the dense model may write in a run, in the order of the seeds.
_WRITTEN = ("pool", "objective", "compensation", "recovery")


def seed_of_writing(use: str, seed: int) -> int:
    """The seed with which the dense model writes text for a use: no two uses and seeds share one."""
    return len(_WRITTEN) * seed + _WRITTEN.index(use)


@GRAPH.in_memory
def window_counts(
    pool: int,
    objective_windows: int | None,
    final_windows: int,
    compensation_windows: int,
    compensation: str,
    space: Space,
    terms: Terms,
) -> dict[str, int]:
    """The number of windows for each use; for the objective, with those for the final choice."""
    counts = {"pool": pool, "objective": scoring_bounds(objective_windows)[1] + final_windows}
    if needs_moments(compensation, space, terms):
        counts["compensation"] = compensation_windows
    return counts


@GRAPH.in_memory
def drawn(
    pool_text: Source | None,
    objective_text: Source | None,
    tokenizer: Tokenizer,
    empty: PreTrainedModel,
    window_counts: dict[str, int],
    objective_windows: int | None,
    seq_len: int,
    seed: int,
) -> Windows:
    """The windows out of datasets by use, [windows, tokens] each, int64; without those that the model writes."""
    fewest = {"pool": window_counts["pool"], "objective": scoring_bounds(objective_windows)[0]}
    windows = {
        use: draw_windows(source, tokenizer, window_counts[use], seq_len, seed, fewest[use])
        for use, source in (("pool", pool_text), ("objective", objective_text))
        if source is not None
    }
    if pool_text is not None and "compensation" in window_counts:
        text = text_windows(pool_text, tokenizer, seq_len)
        windows["compensation"] = evenly_spaced(text, window_counts["compensation"])
        if len(text) < 2:
            raise AdaPrunerError(f"{pool_text} gives one window of {seq_len} tokens, compensation needs 2")
    for tokens in windows.values():
        check_tokens(empty.config, int(tokens.max()))
    return windows


@GRAPH.kept("windows.safetensors", TENSORS, version=4)
def windows(
    dense: PreTrainedModel,
    dense_fast: PreTrainedModel,
    drawn: Windows,
    window_counts: dict[str, int],
    empty: PreTrainedModel,
    samples: int,
    seq_len: int,
    seed: int,
    reporter: Reporter,
) -> Windows:
    """The windows of every use, [windows, tokens] each, int64, on which the loss of the dense model is finite."""
    reporter.note(check_length(empty.config, seq_len) or "")
    windows = dict(drawn)
    for use, count in window_counts.items():
        if use not in windows:
            with reporter.stage(f"writing {use}", count) as advance:
                windows[use] = generate_windows(dense, count, seq_len, seed_of_writing(use, seed), advance)
    with reporter.stage("checking text"):
        finite, note = finite_windows(dense_fast, windows, {"pool": samples, "objective": 1, "compensation": 2})
    reporter.note(note)
    return finite


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


@GRAPH.kept(
    "self.safetensors",
    TENSORS,
    version=3,
    is_wanted=lambda compensation, space, terms, self_windows: (
        needs_moments(compensation, space, terms) and self_windows != 0
    ),
)
def self_written(
    dense_fast: PreTrainedModel,
    windows: Windows,
    window_counts: dict[str, int],
    pool_text: Source | None,
    self_windows: int | None,
    seq_len: int,
    seed: int,
    reporter: Reporter,
) -> Windows:
    """Windows that the dense model writes for compensation, which is fitted on them as well: text of other kinds than
    that of the calibration dataset. Those on which its loss is not finite are dropped."""
    can_write = pool_text is not None and start_token(dense_fast) is not None
    count = written_count(self_windows, len(windows["compensation"]), can_write)
    if not count:
        return {"compensation": torch.empty(0, seq_len, dtype=torch.int64)}
    with reporter.stage("writing text", count) as advance:
        written = generate_windows(dense_fast, count, seq_len, seed_of_writing("compensation", seed), advance)
        return {"compensation": written[window_losses(dense_fast, written).isfinite()]}


@GRAPH.in_memory
def text_to_fit(windows: Windows, self_written: Windows | None, seed: int) -> Tensor | None:
    """[windows, tokens], int64: the text that compensation is fitted on, mixed, because some of it is held out; None
    where nothing is fitted."""
    if "compensation" not in windows:
        return None
    text = windows["compensation"]
    both = torch.cat([text, self_written["compensation"]]) if self_written else text
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))]
