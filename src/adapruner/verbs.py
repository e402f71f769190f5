"""What is done with one model, dense or pruned, outside of a pruning run; and with a run that others are at."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration import SELF_GENERATED, generate_windows, parse_source
from adapruner.checkpoint import (
    GgufType,
    card_of_export,
    card_of_recovered,
    check_gguf,
    check_push,
    push,
    save_checkpoint,
    write_gguf,
)
from adapruner.config import Dtype, PruneConfig, RecoverConfig, RecoveryOptions
from adapruner.cost import Cost, choose_layer_wise, estimate_cost
from adapruner.errors import AdaPrunerError, reason
from adapruner.evaluation import (
    PROTOCOLS,
    Perplexity,
    Speed,
    TaskScore,
    load_tasks,
    mean_accuracies,
    measure_perplexity,
    measure_speed,
    measure_tasks,
)
from adapruner.job import (
    DEFAULT_GENERATED_RECORDS,
    EvaluationText,
    evaluation_text,
    fits_sequentially,
    reference_budget,
)
from adapruner.models import (
    ModelLocation,
    check_length,
    check_tokens,
    empty_model,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
)
from adapruner.paths import given_path, output_path
from adapruner.progress import Reporter
from adapruner.recovery import (
    check_folder,
    read_examples,
    recover_into,
    start_folder,
    total_steps,
    training_alone,
    window_examples,
)
from adapruner.report import write_report
from adapruner.run_folder import RunFolder
from adapruner.structure import Structure, build_structure
from adapruner.surgery import check_paddable, pad_to_stock

ExportFormat = Literal["gguf", "stock"]

_SECONDS_BETWEEN_REPORTS = 5


def load(model: str | Path, dtype: Dtype = "auto", device: str = "auto") -> PreTrainedModel:
    """Loads a pruned or a dense model, ready to `generate`.

    Args:
        model: hub id, model folder (as in `RUN/model`), `.gguf` file, or `smollm2`.
        dtype: `auto` keeps that of the checkpoint.
        device: `auto` takes the first GPU where there is one, else the CPU.

    Raises:
        AdaPrunerError: there is no such model, or it cannot be read.
    """
    return load_model(find_model(str(model)), dtype, device)


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


def recover(
    model: str | Path,
    data: str,
    output: str | Path,
    teacher: str | None = None,
    overwrite: bool = False,
    dtype: Dtype = "auto",
    device: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Trains a pruned model again and writes it as a normal checkpoint. A call that was killed goes on from its last
    saved step.

    Args:
        model: as for `load`.
        data: instructions with answers (columns `instruction`, `output` and perhaps `input`), any text, or `self`: text
            that the teacher writes.
        output: the folder of the recovered model.
        teacher: the dense model, for distillation.
        overwrite: start again where the folder holds another model.
        options: the fields of `RecoveryOptions`.

    Returns:
        The record of the training: what `recovery.json` in the folder holds.

    Raises:
        AdaPrunerError: an option, the data, a model or the folder will not do, before the weights are loaded; or the
            loss is not finite any more.
    """
    config = RecoverConfig.from_options(model=str(model), data=data, teacher=teacher, dtype=dtype, **options)
    folder = output_path(output)
    if folder.resolve() in [given_path(name).resolve() for name in (config.model, teacher) if name]:
        raise AdaPrunerError(f"{output} is a model that this reads from: choose another output")
    resolved = config.model_dump(mode="json")
    record = check_folder(folder, resolved, overwrite)
    if record is not None:
        return record
    resolve_device(device)
    location = find_model(config.model)
    of_model = load_config(location)
    check_length(of_model, config.seq_len)
    tokenizer = load_tokenizer(location)
    of_teacher = find_model(teacher) if teacher else None
    if of_teacher is not None:
        _refuse_other_vocabulary(location, of_teacher)
    settings = RecoveryOptions(**{name: getattr(config, name) for name in RecoveryOptions.model_fields})
    examples = None
    if data != SELF_GENERATED:
        examples = read_examples(parse_source(data), tokenizer, settings)
        check_tokens(of_model, examples.largest_token)
    elif of_teacher is None:
        raise AdaPrunerError("--data self is text that the dense model writes: name it with --teacher")
    with training_alone(folder):
        start_folder(folder, resolved, overwrite)
        reporter = Reporter()
        with reporter.stage("loading", 1) as advance:
            loaded = load_model(location, dtype, device)
            dense = load_model(of_teacher, dtype, device) if of_teacher else None
            advance()
        if examples is None and dense is not None:
            with reporter.stage("writing text", 1) as advance:
                count = settings.records or DEFAULT_GENERATED_RECORDS
                windows = generate_windows(dense, count, settings.seq_len, settings.seed)
                examples = window_examples(windows, data, settings)
                advance()
        assert examples is not None
        learnt_from = None if settings.learns_labels(examples.instructions, dense is not None) else dense
        with reporter.stage("recovering", total_steps(examples, settings)) as advance:
            return recover_into(
                folder,
                loaded,
                tokenizer,
                examples,
                settings,
                learnt_from,
                resolved,
                lambda trained: _card(location, loaded, trained),
                advance,
            )


def _refuse_other_vocabulary(location: ModelLocation, teacher: ModelLocation) -> None:
    own, other = (load_config(one).vocab_size for one in (location, teacher))
    if own != other:
        raise AdaPrunerError(f"the teacher has a vocabulary of {other:,} tokens, the model one of {own:,}")


def benchmark(
    model: str | Path,
    against: str | Path | None = None,
    batch_sizes: Sequence[int] = (1, 16),
    prompt: int = 128,
    generated: int = 32,
    repetitions: int = 5,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> dict[str, Speed]:
    """How large and how fast a model is, and another one beside it, measured in turn in this process.

    Args:
        model: as for `load`.
        against: the model to compare with, the dense one as a rule.
        batch_sizes: sequences at once.
        prompt: tokens that are read at once.
        generated: tokens that are then generated one by one.
        repetitions: of which the median is taken, after one that does not count.

    Raises:
        AdaPrunerError: an option or a model will not do; before the weights are loaded.
    """
    if not batch_sizes or min(*batch_sizes, prompt, generated, repetitions) < 1:
        raise AdaPrunerError("batch sizes, tokens and repetitions must be at least 1")
    resolve_device(device)
    locations = {str(name): find_model(str(name)) for name in (against, model) if name is not None}
    for location in locations.values():
        check_length(empty_model(load_config(location)).config, prompt + generated)
    reporter = Reporter()
    with reporter.stage("loading", len(locations)) as advance:
        loaded = {}
        for name, location in locations.items():
            loaded[name] = load_model(location, dtype, device)
            advance()
    with reporter.stage("measuring", len(loaded) * len(batch_sizes) * (repetitions + 1)) as advance:
        return measure_speed(loaded, batch_sizes, prompt, generated, repetitions, advance)


def inspect(model: str | Path) -> Structure:
    """What of a model can be pruned, from its config alone.

    Raises:
        AdaPrunerError: there is no such model, or its family is not known.
    """
    return build_structure(empty_model(load_config(find_model(str(model)))))


def estimate(model: str | Path, device: str = "auto", timed: bool = True, **options: Any) -> Cost:
    """What `prune` would take with these options: the memory of each stage, and the time on this machine.

    Args:
        device: where the model would run; for one that is not here, there is no time.
        options: the fields of `PruneOptions`.

    Raises:
        AdaPrunerError: there is no such model, or an option will not do.
    """
    config = PruneConfig.from_options(model=str(model), device=device, **options)
    # Memory is known without the device.
    is_here = device != "cuda" or torch.cuda.is_available()
    where = resolve_device(device) if is_here else torch.device("cuda")
    empty = empty_model(load_config(find_model(str(model))))
    check_length(empty.config, config.seq_len)
    structure = build_structure(empty, config.head_granularity)
    budget = reference_budget(config, structure)
    config = config.model_copy(update={"sequential": fits_sequentially(config, empty)})
    by_layer = config.layer_wise
    if by_layer is None and is_here:
        streamable = find_model(str(model)).gguf_file is None
        try:
            by_layer = choose_layer_wise(config, empty, structure, budget, where, streamable)
        except AdaPrunerError as error:
            Reporter().note(f"this does not fit here: {error}")
            by_layer = streamable
    return estimate_cost(config, empty, structure, budget, where, timed and is_here, by_layer)


@dataclass(frozen=True)
class Exported:
    """Where an export is, and its size in bytes."""

    path: Path
    size: int


def export(
    model: str | Path,
    to: ExportFormat,
    output: str | Path,
    gguf_type: GgufType = "f16",
    overwrite: bool = False,
    push_to_hub: str | None = None,
) -> Exported:
    """Writes a model, pruned or dense, in a form that other loaders read.

    Args:
        model: as for `load`.
        to: `gguf` writes one file for llama.cpp; `stock` a folder for any loader of the family, with short layers
            padded with zeros to the widest (see `surgery.pad_to_stock`).
        output: the file or folder.
        gguf_type: how a GGUF file stores matrices.
        overwrite: replace what is there.
        push_to_hub: upload the result to this repository.

    Raises:
        AdaPrunerError: the model cannot be written in this form, or something is there already.
    """
    path = output_path(output)
    if path.exists() and not overwrite:
        raise AdaPrunerError(f"{path} exists: choose another output, or --overwrite to replace it")
    if path.is_dir() != (to == "stock") and path.exists():
        raise AdaPrunerError(f"{path} is no {'folder' if to == 'stock' else 'file'}: choose another output")
    if path.is_dir() and not (path / "config.json").is_file() and any(path.iterdir()):
        raise AdaPrunerError(f"{path} holds something else than a model: choose another output")
    if push_to_hub:
        check_push(push_to_hub)
    location = find_model(str(model))
    without_weights = empty_model(load_config(location))
    if to == "gguf":
        check_gguf(without_weights)
    else:
        check_paddable(without_weights)
    tokenizer = load_tokenizer(location)
    reporter = Reporter()
    with reporter.stage("loading", 1) as advance:
        loaded = load_model(location, "auto", "cpu")
        advance()
    with reporter.stage("writing", 1) as advance:
        try:
            if to == "gguf":
                write_gguf(loaded, tokenizer, path, gguf_type)
            else:
                padded = pad_to_stock(loaded)
                save_checkpoint(padded, tokenizer, path, _card(location, padded))
        except (OSError, SafetensorError) as error:
            raise AdaPrunerError(f"cannot write to {path}: {reason(error)}") from error
        advance()
    if push_to_hub:
        push(path, push_to_hub)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Exported(path, sum(file.stat().st_size for file in files))


def write_reports(output: str | Path, watch: bool = False) -> Iterator[Path]:
    """Writes the report of a run, finished or not; yields its path each time.

    Args:
        output: the run folder.
        watch: write it every few seconds as long as a process is at the run, and once more when it has ended.

    Raises:
        AdaPrunerError: the folder holds no run, or cannot be written.
    """
    run = RunFolder(Path(output))
    while watch and run.is_led():
        yield write_report(run, _SECONDS_BETWEEN_REPORTS)
        time.sleep(_SECONDS_BETWEEN_REPORTS)
    yield write_report(run)


def _card(location: ModelLocation, written: PreTrainedModel, trained: dict[str, Any] | None = None) -> str | None:
    """The card of a model for what was made of it."""
    readme = Path(location.path) / "README.md"
    if location.gguf_file or not readme.is_file():
        return None
    card = readme.read_text(encoding="utf-8", errors="replace")
    return card_of_export(card, written.config) if trained is None else card_of_recovered(card, trained)
