"""Perplexity and task scores of one model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration import parse_source
from adapruner.config import Dtype
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import (
    PROTOCOLS,
    Perplexity,
    TaskScore,
    load_tasks,
    mean_accuracies,
    measure_perplexity,
    measure_tasks,
)
from adapruner.job import EvaluationText, evaluation_text
from adapruner.models import (
    check_length,
    check_tokens,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
)
from adapruner.progress import Reporter


@dataclass(frozen=True)
class Evaluation:
    """What a model scores, each number with its protocol."""

    perplexity: list[Perplexity]
    tasks: list[TaskScore]

    @property
    def mean_accuracies(self) -> dict[str, float]:
        """Means over the tasks, see `evaluation.mean_accuracies`."""
        return mean_accuracies(score.metrics for score in self.tasks)


def evaluate(
    model: str | Path,
    perplexity: Sequence[str] = (),
    protocol: str | None = None,
    window_length: int = 128,
    stride: int | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> Evaluation:
    """Perplexity on texts and scores in tasks of any model, each with its protocol.

    Args:
        model: as for `load`.
        perplexity: text sources.
        protocol: texts and window length as others report them: `llm-pruner` (WikiText2 test and PTB validation, 128
            tokens; where nothing at all is asked for) or `2048` (WikiText2 test, 2048 tokens).
        window_length: tokens per window of the texts in `perplexity`.
        stride: tokens between the beginnings of these windows; by default they do not overlap.
        tasks: of lm-eval; `commonsense` is the seven of the paper.
        limit: take only so many windows of each text and items of each task, evenly spaced.

    Raises:
        AdaPrunerError: an option, the model, a text or a task will not do; before the weights are loaded.
    """
    if window_length < 2 or (limit is not None and limit < 1):
        raise AdaPrunerError(f"windows need at least 2 tokens and a limit at least 1, not {window_length} and {limit}")
    if stride is not None and not 1 <= stride <= window_length:
        raise AdaPrunerError(f"a stride of {stride} leaves out text or goes nowhere: choose 1 to {window_length}")
    if protocol is None and not perplexity and not tasks:
        protocol = "llm-pruner"
    resolve_device(device)
    location = find_model(str(model))
    config = load_config(location)
    tokenizer = load_tokenizer(location)
    texts = _texts_of_protocol(protocol, tokenizer, limit) if protocol else {}
    for source in map(parse_source, perplexity):
        texts[str(source)] = evaluation_text(source, tokenizer, window_length, limit, stride)
    for text in texts.values():
        check_length(config, text.windows.shape[1])
        check_tokens(config, int(text.windows.max()))
    to_run = load_tasks(tasks, limit) if tasks else None
    reporter = Reporter()
    with reporter.stage("loading", 1) as advance:
        loaded = load_model(location, dtype, device)
        advance()
    perplexities, scores = [], []
    if texts:
        with reporter.stage("evaluating", sum(len(text.windows) for text in texts.values())) as advance:
            for name, text in texts.items():
                perplexities.append(
                    measure_perplexity(loaded, text.windows, name, advance, text.stride, text.provenance)
                )
    if any(math.isnan(one.perplexity) for one in perplexities):
        raise AdaPrunerError(
            f"what {str(model)!r} computes are no numbers: its weights are broken, or {loaded.dtype} is too narrow"
        )
    if to_run:
        with reporter.stage("running tasks", len(to_run)) as advance:
            scores = measure_tasks(loaded, tokenizer, to_run, advance)
    return Evaluation(perplexities, scores)


def _texts_of_protocol(name: str, tokenizer: Tokenizer, limit: int | None) -> dict[str, EvaluationText]:
    if name not in PROTOCOLS:
        raise AdaPrunerError(f"unknown protocol {name!r}; the protocols are {', '.join(PROTOCOLS)}")
    return {
        text: evaluation_text(parse_source(text), tokenizer, PROTOCOLS[name].window_length, limit)
        for text in PROTOCOLS[name].texts
    }
