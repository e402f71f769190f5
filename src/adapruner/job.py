"""A pruning job: everything that is known, checked and refused before the weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration import (
    SELF_GENERATED,
    Part,
    Source,
    draw_windows,
    evenly_spaced,
    parse_source,
    provenance,
    read_documents,
    text_windows,
)
from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import Tasks, load_tasks
from adapruner.memory import choose_layer_wise
from adapruner.models import (
    ModelLocation,
    architecture_of,
    check_length,
    check_streamable,
    check_tokens,
    empty_model,
    find_model,
    load_config,
    load_tokenizer,
    resolve_device,
)
from adapruner.planning import Budget, UnreachableRatioError, kept_counts, largest_channel_share
from adapruner.processes import this_process
from adapruner.recovery import Examples, check_device, read_examples
from adapruner.run_folder import RunFolder
from adapruner.search import StudyPlace
from adapruner.structure import Structure, build_structure

# Protected layers at both ends and share of heads, from what hurts least to what reaches furthest.
_DEFAULT_ALLOCATIONS = ((4, 3, 0.0), (2, 2, 0.0), (1, 1, 0.0), (1, 1, 0.5), (2, 1, 1.0), (0, 0, 1.0))
# Taking more of the channels of a layer hurts more than taking heads or fewer layers whole (see docs/benchmarks.md).
MOST_CHANNELS = 0.8
# Windows that a model writes to be trained on, where their number is left open.
DEFAULT_GENERATED_RECORDS = 1024


@dataclass(frozen=True)
class Job:
    """What the stages work on.

    Attributes:
        budget: what goes, and from where as far as that is not searched.
        windows: `pool`, `objective` and `compensation`, [windows, tokens] each; without those that the model shall
            write itself.
        report: what to report perplexity on, by name.
        tasks: what to run of lm-eval.
        examples: to train the pruned model on; None where it is not trained, or the model shall write them itself.
        study: where the trials are kept.
        layer_wise: whether one decoder layer at a time is in memory.
        fits_sequentially: whether the final model is fitted once more, layer by layer.
    """

    config: PruneConfig
    run: RunFolder
    location: ModelLocation
    tokenizer: Tokenizer
    structure: Structure
    budget: Budget
    windows: dict[str, Tensor]
    report: dict[str, EvaluationText]
    tasks: Tasks | None
    examples: Examples | None
    study: StudyPlace
    layer_wise: bool
    fits_sequentially: bool


@dataclass(frozen=True)
class Outline:
    """What is known of a job from its options and the config of the model alone.

    Attributes:
        config: the options, with `sequential` saying what is done.
        model: without weights.
        budget: as in `Job`.
    """

    config: PruneConfig
    model: PreTrainedModel
    structure: Structure
    budget: Budget


def outline(config: PruneConfig, location: ModelLocation) -> Outline:
    """Reads the config of a model.

    Raises:
        AdaPrunerError: the family is not known, or an option or the ratio does not go with it.
    """
    model = empty_model(load_config(location))
    check_length(model.config, max(config.seq_len, config.recovery.seq_len if config.recover else 0))
    structure = build_structure(model, config.head_granularity)
    budget = reference_budget(config, structure)
    sequential = _fits_sequentially(config, model)
    return Outline(config.model_copy(update={"sequential": sequential}), model, structure, budget)


def prepare(
    config: PruneConfig,
    run: RunFolder,
    drawn: Path | None,
    database: str | None = None,
    overwrite: bool = False,
    reports: bool = True,
) -> Job:
    """Reads configs, tokenizer and text, and refuses whatever would fail later.

    Args:
        drawn: windows of an earlier call, which are not drawn again where the file is there.
        database: URL of the database that keeps the trials; None for a journal in the run folder.
        overwrite: what the run folder holds will go.
        reports: whether this process evaluates; others need none of that text.
    """
    device = resolve_device(config.device)
    study = StudyPlace(run.path, database)
    study.check(overwrite)
    location = find_model(config.model)
    if config.layer_wise:
        check_streamable(location)
    if config.recover:
        check_device(device)
        _check_batch(config)
    own = outline(config, location)
    of_model = own.model.config
    layer_wise = choose_layer_wise(own.config, own.model, own.structure, own.budget, device, location.gguf_file is None)
    tokenizer = load_tokenizer(location)
    sources = _calibration_sources(config)
    used: set[tuple[str, Part]] = set()
    for use, source in sources.items():
        _refuse_used_text(source, used, use)
        used.add((source.identity, source.part))
    windows = load_file(drawn) if drawn is not None and drawn.is_file() else _draw(config, sources, tokenizer)
    recovery_source = _recovery_source(config, used)
    if recovery_source is not None:
        used.add((recovery_source.identity, recovery_source.part))
    report = _report_texts(config, used, tokenizer) if reports else {}
    examples = None
    if recovery_source is not None:
        examples = read_examples(recovery_source, tokenizer, config.recovery)
        check_tokens(of_model, examples.largest_token)
    for each in (*windows.values(), *(text.windows for text in report.values())):
        check_tokens(of_model, int(each.max()))
    tasks = None
    if config.tasks and reports:
        seen = [*sources.values(), *([recovery_source] if recovery_source else [])]
        documents = [document for source in seen for document in read_documents(source)]
        tasks = load_tasks(config.tasks, config.task_limit, documents)
    return Job(
        config=config,
        run=run,
        location=location,
        tokenizer=tokenizer,
        structure=own.structure,
        budget=own.budget,
        windows=windows,
        report=report,
        tasks=tasks,
        examples=examples,
        study=study,
        layer_wise=layer_wise,
        fits_sequentially=own.config.fits_sequentially,
    )


def _report_texts(config: PruneConfig, used: set[tuple[str, Part]], tokenizer: Tokenizer) -> dict[str, EvaluationText]:
    """What perplexity is reported on, by name; of texts that are used already, their part for reports."""
    texts = {}
    for source in map(parse_source, config.evaluate):
        if source.identity in {identity for identity, _ in used}:
            source = source.restrict("report")
        _refuse_used_text(source, used, "report")
        texts[str(source)] = evaluation_text(source, tokenizer, config.seq_len, config.evaluate_windows)
    return texts


def _check_batch(config: PruneConfig) -> None:
    """Refuses a batch that the processes cannot share evenly."""
    size, processes = config.recovery.batch_size, this_process().count
    if size % processes:
        raise AdaPrunerError(f"--recovery.batch-size {size} cannot be divided among {processes} processes")


@dataclass(frozen=True)
class EvaluationText:
    """Windows of a text, [windows, tokens], the tokens between their beginnings, and what the text is."""

    windows: Tensor
    stride: int
    provenance: dict[str, str]


def evaluation_text(
    source: Source, tokenizer: Tokenizer, length: int, limit: int | None, stride: int | None = None
) -> EvaluationText:
    """Cuts a text into windows to measure perplexity on.

    Args:
        limit: at most so many windows, evenly spaced.
        stride: tokens between the beginnings of windows; by default they do not overlap.
    """
    windows = evenly_spaced(text_windows(source, tokenizer, length, stride), limit)
    name = Path(tokenizer.name_or_path).name or type(tokenizer).__name__
    return EvaluationText(
        windows, stride or length, provenance(source) | {"tokenizer": f"{name}, {len(tokenizer):,} tokens"}
    )


def _recovery_source(config: PruneConfig, used: set[tuple[str, Part]]) -> Source | None:
    """The text that the model is trained on; where it is also that of something else, its part to calibrate on."""
    if config.recover in (None, SELF_GENERATED):
        return None
    source = parse_source(str(config.recover))
    others = {identity for identity, _ in used} | {parse_source(text).identity for text in config.evaluate}
    return source.restrict("calibration") if source.identity in others else source


def reference_budget(config: PruneConfig, structure: Structure) -> Budget:
    """What is to go, from where the options say; else from the feed-forward channels of the middle layers, and from
    more layers and heads only where that would take more than `MOST_CHANNELS` of the channels of a layer.

    Raises:
        AdaPrunerError: the ratio cannot be met; with the arithmetic.
    """
    given = {
        name: value
        for name in ("protect_first", "protect_last", "head_share")
        if (value := getattr(config, name)) is not None
    }
    reachable: dict[Budget, float] = {}
    for first, last, head_share in _DEFAULT_ALLOCATIONS:
        fields = {"protect_first": first, "protect_last": last, "head_share": head_share} | given
        budget = Budget(
            config.ratio, round_to=config.round_to, layout=config.layout, ratio_of=config.ratio_of, **fields
        )
        try:
            taken = largest_channel_share(structure, kept_counts(structure, budget))
        except UnreachableRatioError as error:
            refusal = error
        else:
            if taken <= MOST_CHANNELS:
                return budget
            reachable[budget] = taken
    if not reachable:
        raise refusal
    return min(reachable, key=reachable.__getitem__)


def _fits_sequentially(config: PruneConfig, model: PreTrainedModel) -> bool:
    possible = architecture_of(model.config).has_plain_residual(model.config)
    if config.sequential and not possible:
        raise AdaPrunerError(
            f"--sequential is not possible for {model.config.model_type}, which scales or normalises what its blocks"
            " put out: leave it out, compensation is one-shot then"
        )
    return config.fits_sequentially and possible


def needs_moments(config: PruneConfig) -> bool:
    """Whether second moments are measured."""
    return config.compensation != "none" or config.space == "extended"


def _draw(config: PruneConfig, sources: dict[str, Source], tokenizer: Tokenizer) -> dict[str, Tensor]:
    counts = window_counts(config)
    at_least = {"pool": config.pool, "objective": config.objective_windows}
    windows = {
        use: draw_windows(source, tokenizer, counts[use], config.seq_len, config.seed, at_least[use])
        for use, source in sources.items()
    }
    if "pool" in sources and "compensation" in counts:
        text = text_windows(sources["pool"], tokenizer, config.seq_len)
        windows["compensation"] = evenly_spaced(text, counts["compensation"])
        if len(windows["compensation"]) < 2:
            raise AdaPrunerError(f"{sources['pool']} gives one window of {config.seq_len} tokens, compensation needs 2")
    return windows


def _calibration_sources(config: PruneConfig) -> dict[str, Source]:
    """Disjoint parts of the texts for the pool and for the objective; without those that the model writes itself."""
    texts = {"pool": config.calibration, "objective": config.objective or config.calibration}
    parts: dict[str, Part] = {"pool": "calibration", "objective": "objective"}
    return {use: parse_source(text).restrict(parts[use]) for use, text in texts.items() if text != SELF_GENERATED}


def _refuse_used_text(source: Source, used: set[tuple[str, Part]], use: str) -> None:
    """What is chosen on, judged on and reported must be different text."""
    if (source.identity, source.part) in used:
        raise AdaPrunerError(
            f"the {use} would be drawn from {source}, which is used already: name another part or another text"
        )


def window_counts(config: PruneConfig) -> dict[str, int]:
    """How many windows there are for each use; for the objective, with those for the final choice."""
    counts = {"pool": config.pool, "objective": config.objective_windows + config.final_windows}
    if needs_moments(config):
        counts["compensation"] = config.compensation_windows
    if config.recover == SELF_GENERATED:
        counts["recovery"] = config.recovery.records or DEFAULT_GENERATED_RECORDS
    return counts
