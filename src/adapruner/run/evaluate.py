"""Perplexity and task scores of one model, and what it writes compared with the dense model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.base.progress import Reporter
from adapruner.checkpoint import read_origin
from adapruner.evaluation.abilities import (
    Abilities,
    Estimate,
    Verdict,
    at_chance,
    estimates,
    judge,
    measure_abilities,
    write_answers,
)
from adapruner.evaluation.losses import PROTOCOLS, Perplexity, measure_perplexity
from adapruner.evaluation.speed import SPEED_TOKENS, Speed, measure_speed
from adapruner.evaluation.tasks import TaskScore, load_tasks, mean_accuracies, measure_tasks
from adapruner.families import open_config, open_model
from adapruner.model.architecture import check_length, check_tokens, family_named
from adapruner.model.loading import (
    check_streamable,
    empty_model,
    in_fastest_dtype,
    is_streamable,
    load_tokenizer,
    resolve_devices,
    usable_devices,
)
from adapruner.model.places import ModelLocation, find_model
from adapruner.options import Dtype
from adapruner.run.memory import Placement, place_weights
from adapruner.text.blends import overlaps
from adapruner.text.sources import Source, parse_source
from adapruner.text.windows import evaluation_text, texts_to_report
from adapruner.tokens.tokenizer import spelling_of, tokens_of_both

# Tokens per window, if nothing else is said.
_SHORT = 128


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model, each number with its protocol.

    Attributes:
        overlaps: a sentence for each evaluated dataset on which the model was also pruned or trained.
        dense, abilities: what the model to compare with can do, and the model; None without `against`.
        left: what is left of each ability; empty without `against`.
        verdict: on that.
        speed: size and speed, one sequence at a time; None if not requested, and layer by layer.
    """

    perplexity: list[Perplexity]
    tasks: list[TaskScore]
    overlaps: list[str] = field(default_factory=list)
    dense: Abilities | None = None
    abilities: Abilities | None = None
    left: dict[str, Estimate] = field(default_factory=dict)
    verdict: Verdict | None = None
    speed: Speed | None = None

    @property
    def mean_accuracies(self) -> dict[str, float]:
        """Means over the tasks, see `evaluation.mean_accuracies`."""
        return mean_accuracies(score.metrics for score in self.tasks)


def evaluate(
    model: str | Path,
    perplexity: str | Sequence[str] | Mapping[str, Iterable[str]] = (),
    protocol: str | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    bos: bool = True,
    tasks: str | Sequence[str] = (),
    limit: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    layer_wise: bool | None = None,
    against: str | Path | None = None,
    speed: bool = False,
) -> Evaluation:
    """Perplexity on texts and scores in tasks of any model, each with its protocol; with a dense model, what it
    can still do and the verdict.

    Args:
        model: as for `load`.
        perplexity: a dataset, or several; or documents in memory, one or several, by the name that is shown.
        protocol: a protocol of the literature, see `PROTOCOLS`; `llm-pruner` if no dataset and no task is named.
        seq_len: tokens per window of the texts in `perplexity`; by default both 128 and 2048, or as many as the model
            and the text have.
        stride: tokens between the beginnings of these windows; by default they do not overlap.
        bos: begin each of these windows with the token for the beginning of a text, if the tokenizer has one; protocols
            do not.
        tasks: tasks of lm-eval; `commonsense` is the seven of the paper, `generative` is GSM8K and IFEval.
        limit: maximum number of windows of each dataset and of items of each task, evenly spaced.
        device: `auto` uses as many GPUs as the weights need.
        layer_wise: keep one decoder layer in memory at a time; by default if the weights do not fit. Perplexity then
            reads the weights a few times, tasks once for every batch.
        against: the dense model, as for `model`. It writes text that both read; layer by layer they read built-in
            text. Where the two have different tokens, their predictions are not compared.
        speed: also measure size and tokens per second, one sequence at a time; not layer by layer.

    Raises:
        AdaPrunerError: an option, the model, a text or a task is invalid; before the weights are loaded.
    """
    perplexity = [perplexity] if isinstance(perplexity, str) else perplexity
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    if protocol is None and not perplexity and not tasks and (against is None or speed):
        protocol = "llm-pruner"
    if seq_len is not None and seq_len < 2:
        raise AdaPrunerError(f"`seq_len` {seq_len} is too short: windows need at least 2 tokens")
    if limit is not None and limit < 1:
        raise AdaPrunerError(f"`limit` {limit} leaves nothing to evaluate: choose at least 1")
    if stride is not None and not 1 <= stride <= (seq_len or _SHORT):
        raise AdaPrunerError(f"`stride` {stride} skips text or does not advance: choose 1 to {seq_len or _SHORT}")
    if protocol is not None and protocol not in PROTOCOLS:
        raise AdaPrunerError(f"unknown protocol {protocol!r}; the protocols are {', '.join(PROTOCOLS)}")
    names, protocol_seq_len = PROTOCOLS[protocol] if protocol else ((), _SHORT)
    published, given = _named_texts(names), _named_texts(perplexity)
    located = [(place, open_config(place)) for place in map(find_model, [model, *([against] if against else [])])]
    tokenizers = [load_tokenizer(place) for place, _ in located]
    (location, config), tokenizer = located[0], tokenizers[0]
    placement = _placement(located, dtype, device, layer_wise)
    texts = [(name, evaluation_text(text, tokenizer, protocol_seq_len, limit, bos=False)) for name, text in published]
    positions = getattr(config, "max_position_embeddings", None)
    for name, source in given:
        if seq_len is None and stride is None:
            texts += texts_to_report(source, tokenizer, _SHORT, limit, positions, bos, name).items()
        else:
            texts.append((name, evaluation_text(source, tokenizer, seq_len or _SHORT, limit, stride, bos, name)))
    for _, text in texts:
        check_tokens(config, int(text.windows.max()))
    to_run = load_tasks(tasks, limit) if tasks else None
    sources = dict.fromkeys(text for _, text in (*published, *given) if isinstance(text, Source))
    origin = read_origin(location) or {"texts": []}
    known_uses = [
        f"the perplexity on {text} is optimistic: the checkpoint was {use}, which holds some of the same documents"
        for text in sources
        for use in overlaps(origin["texts"], text)
    ]
    reporter = Reporter()
    warnings = [check_length(config, text.windows.shape[1]) for _, text in texts]
    reporter.note("\n".join(filter(None, dict.fromkeys(warnings))))
    scores, measured_speed = [], None
    of_dense, abilities, left = None, None, dict[str, Estimate]()
    with reporter.stage("loading"):
        models = [open_model(place, dtype, placement.device, placement.layer_wise) for place, _ in located]
    loaded, *dense = models
    perplexities: list[Perplexity] = []
    if texts:
        with reporter.stage("evaluating", sum(len(text.windows) for _, text in texts)) as advance:
            perplexities = [
                measure_perplexity(loaded, text.windows, name, advance, **text.about) for name, text in texts
            ]
    if any(math.isnan(measured.perplexity) for measured in perplexities):
        raise AdaPrunerError(
            f"the model predicts numbers that are NaN: its weights are broken, or {loaded.dtype} is too narrow"
        )
    if speed and not placement.layer_wise:
        with reporter.stage("measuring speed", None) as advance:
            measured_speed = measure_speed({"": loaded}, (1,), progress=advance)[""]
    if to_run:
        with reporter.stage("running tasks", len(to_run)) as advance:
            scores = measure_tasks(loaded, tokenizer, to_run, advance)
    if dense:
        with reporter.stage("comparing abilities"):
            of_dense, abilities, chance = _compare(*reversed([*zip(models, tokenizers, strict=True)]))
            left = estimates(of_dense, abilities, chance)
    verdict = judge(left) if left else None
    return Evaluation(perplexities, scores, known_uses, of_dense, abilities, left, verdict, measured_speed)


def evaluate_each(models: Sequence[str], against: str | None = None, **options: Any) -> dict[str, Evaluation]:
    """Evaluates models one after the other, each with its size and speed, once all of them were found.

    Args:
        against: the dense model; if it is one of the models, it is not compared with itself.
        options: further arguments of `evaluate`.
    """
    for location in map(find_model, models):
        check_length(open_config(location), sum(SPEED_TOKENS))
        load_tokenizer(location)
    return {
        model: evaluate(model, against=None if model == against else against, speed=True, **options) for model in models
    }


def _compare(
    dense: tuple[PreTrainedModel, Tokenizer], pruned: tuple[PreTrainedModel, Tokenizer]
) -> tuple[Abilities, Abilities, dict[str, str]]:
    """What two models with their tokenizers can do, and what the first one shows no more than by chance."""
    (original, vocabulary), (model, tokenizer) = ((in_fastest_dtype(model), own) for model, own in (dense, pruned))
    answers = write_answers(original, vocabulary, positions=getattr(model.config, "max_position_embeddings", None))
    spelling = spelling_of(vocabulary, tokenizer)
    counted = tokens_of_both(vocabulary, tokenizer) if spelling else None
    other = None if spelling or tokenizer.get_vocab() == vocabulary.get_vocab() else vocabulary
    return (
        measure_abilities(original, vocabulary, answers, counted=counted),
        measure_abilities(model, tokenizer, answers, other, spelling, counted),
        at_chance(original, vocabulary),
    )


def _placement(
    located: Sequence[tuple[ModelLocation, PreTrainedConfig]], dtype: Dtype, device: str, layer_wise: bool | None
) -> Placement:
    """The devices of the layers of models that are held together; refuses `layer_wise` and several devices where they
    are impossible."""
    named = resolve_devices(device)
    if layer_wise:
        for location, config in located:
            check_streamable(location, config)
        return Placement(named[:1], True)
    # The shapes of a quantized model do not tell its size.
    for _, config in located:
        if family_named(config.model_type) is None or getattr(config, "quantization_config", None) is not None:
            if len(named) > 1:
                raise AdaPrunerError(
                    f"`device` {device}: this {config.model_type} cannot be spread over several devices: name one"
                )
            return Placement(named, False)
    least = 1 if device == "auto" else len(named)
    may_stream = layer_wise is None and all(is_streamable(*of_model) for of_model in located)
    empty = [empty_model(config) for _, config in located]
    return place_weights(empty, dtype, usable_devices(device), least, may_stream)


def _named_texts(perplexity: Sequence[str] | Mapping[str, Iterable[str]]) -> list[tuple[str, Source | str]]:
    """The texts that a user named or gave, by the name that is shown."""
    if isinstance(perplexity, Mapping):
        return [(name, text if isinstance(text, str) else "\n\n".join(text)) for name, text in perplexity.items()]
    return [(str(source), source) for source in (parse_source(name, "report") for name in perplexity)]
