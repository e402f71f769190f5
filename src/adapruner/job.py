"""What the artifacts of a run are made with; each part is read and validated when it is first used."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.artifacts import at_hand
from adapruner.calibration import (
    SELF_GENERATED,
    EvaluationText,
    Source,
    draw_windows,
    evaluation_text,
    evenly_spaced,
    fingerprint,
    register_sources,
    start_token,
    text_windows,
)
from adapruner.callbacks import Callback
from adapruner.checkpoint import check_gguf
from adapruner.config import PruneConfig
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
from adapruner.evaluation import Tasks, load_tasks
from adapruner.files import write_atomically
from adapruner.given import name_of_code
from adapruner.importance import TERMS, Term, needed_statistics
from adapruner.memory import Placement, choose_placement, dtype_of_weights, estimate_memory, room_for_moments
from adapruner.models import (
    ModelLocation,
    architecture_of,
    check_length,
    check_streamable,
    check_tokens,
    empty_model,
    find_model,
    is_pruned,
    is_streamable,
    load_config,
    load_model,
    load_tokenizer,
    register_architectures,
    resolve_devices,
    trial_dtype,
    usable_devices,
)
from adapruner.models import fingerprint as fingerprint_of_model
from adapruner.planning import Budget, Target, kept_counts, make_plan, reference_budget
from adapruner.plugins import load_plugins
from adapruner.processes import Process
from adapruner.progress import Reporter
from adapruner.recovery import Examples, check_adapters, check_device, read_examples, scale_options
from adapruner.run import RunFolder
from adapruner.search import ItemLosses, StudyPlace, sqlite_url
from adapruner.structure import Structure, build_structure
from adapruner.surgery import prune_model
from adapruner.texts import Texts, assign_texts, report_windows
from adapruner.tokens import (
    TokenizerParts,
    Vocabulary,
    cut_config,
    cut_tokenizer,
    cut_vocabulary,
    read_generation_config,
    select_vocabulary,
)

# The artifact with the chosen tokens.
VOCABULARY = "vocabulary.json"
# The artifact with what layers take on this machine.
LATENCIES = "latencies.json"

_LEVEL_ROUNDS = 2


@dataclass
class Preparation:
    """What does not depend on the ratio: the model, the texts, and where everything runs.

    Attributes:
        config: the options; its ratios are all those of the run.
        folder: the run folder.
        storage: URL of the database that keeps the trials; None for a SQLite file in the run folder.
        others: earlier run folders, whose artifacts are taken over.
        item_losses: the function that judges trials, where the config names one.
        callbacks: told of every trial.
    """

    config: PruneConfig
    folder: RunFolder
    storage: str | None
    process: Process
    reporter: Reporter
    others: tuple[RunFolder, ...] = ()
    item_losses: ItemLosses | None = None
    callbacks: tuple[Callback, ...] = ()

    @cached_property
    def location(self) -> ModelLocation:
        return find_model(self.config.model)

    @cached_property
    def device(self) -> torch.device:
        """Where the model is; of several devices, the first."""
        return resolve_devices(self.config.device)[0]

    @cached_property
    def config_given(self) -> PreTrainedConfig:
        """The config of the given model, with all of its tokens."""
        config = load_config(self.location)
        check_length(config, self._seq_len)
        return config

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The tokens that are kept: those that the run has chosen, or else chosen now; None if all are."""
        if not self.config.vocabulary:
            return None
        for folder in (self.folder, *self.others):
            if self._is_chosen_in(folder):
                return Vocabulary.model_validate_json((folder.path / VOCABULARY).read_bytes())
        config = self.config_given
        with self.reporter.stage("counting tokens") as advance:
            return select_vocabulary(
                self.tokenizer_given,
                config,
                read_generation_config(self.location, config),
                self.texts.vocabulary,
                self.config.vocabulary_size,
                self.config.vocabulary_multiple,
                advance,
            )

    def _is_chosen_in(self, folder: RunFolder) -> bool:
        record = folder.record(VOCABULARY)
        if record is None or not folder.is_made(VOCABULARY, record.key):
            return False
        leaves = {"model": fingerprint_of_model(self.location), "vocabulary_texts": self._vocabulary_leaf}
        options = {name: getattr(self.config, name) for name in ("vocabulary_size", "vocabulary_multiple")}
        return record.options == options and record.leaves == at_hand(leaves, record.leaves)

    @cached_property
    def _vocabulary_leaf(self) -> dict[str, Any]:
        return {str(source): _leaf_of_text(source) for source in self.texts.vocabulary}

    @cached_property
    def empty(self) -> PreTrainedModel:
        """The dense model without weights, with the tokens that are kept."""
        config = self.config_given
        return empty_model(cut_config(config, self.vocabulary) if self.vocabulary else config)

    def ratio_of_blocks(self, ratio: float) -> float:
        """What of the remaining parameters blocks must lose, for a ratio of all parameters of the given model.

        Raises:
            AdaPrunerError: the vocabulary alone is more than the ratio.
        """
        if self.vocabulary is None or self.config.ratio_of == "groups":
            return ratio
        summary = self.vocabulary.summary
        left = ratio * summary.parameters_before - summary.removed_parameters
        if left <= 0:
            share = summary.removed_parameters / summary.parameters_before
            raise AdaPrunerError(
                f"`ratio` {ratio} is less than what the vocabulary alone gives, {share:.3f} of the"
                f" {summary.parameters_before:,} parameters: choose a larger ratio, or a larger `vocabulary_size`;"
                " adapruner vocabulary removes tokens and nothing else"
            )
        return left / summary.parameters_after

    @cached_property
    def latencies(self) -> Latencies:
        """What layers take on this machine."""
        return self._latencies_of(self.config)

    def _latencies_of(self, config: PruneConfig) -> Latencies:
        """As the run has measured them, or else as this user has, or measured now."""
        check_latencies(self.structure)
        model = self.empty.config
        phase, batch, context = config.target_phase, config.target_batch, config.tokens_of_target
        about = describe_measuring(model, self.dtype, self.device, phase, batch, context)
        for folder in (self.folder, *self.others):
            record = folder.record(LATENCIES)
            if record is not None and folder.is_made(LATENCIES, record.key):
                earlier = Latencies.model_validate_json((folder.path / LATENCIES).read_bytes())
                if earlier.are_of(about):
                    return earlier

        def measure() -> Latencies:
            layers = layers_to_measure(self.structure, self.dtype)
            with self.reporter.stage("timing layers", timings(self.structure)) as advance:
                make = partial(measured_model, model, dtype=self.dtype, device=self.device)
                return measure_latencies(self.structure, make, layers, timer(phase, batch, context), about, advance)

        return read_latencies(about, measure)

    @cached_property
    def target(self) -> Target | None:
        """What replaces the ratio."""
        return self._target_of(self.config, lambda: self.latencies)

    @cached_property
    def searched_target(self) -> Target | None:
        """What trials meet in place of the ratio of the search."""
        options = self.config.searched_target
        if options is None:
            return None
        searched = self.config.model_copy(update=options)
        if searched == self.config:
            return self.target
        return self._target_of(searched, partial(self._latencies_of, searched))

    def _target_of(self, config: PruneConfig, latencies: Callable[[], Latencies]) -> Target | None:
        return target_of(config, self.empty, self.structure, self.dtype, self.tokenizer, latencies)

    def ratio_of_target(self, target: Target) -> float:
        """The ratio that the search starts with to meet a target, from where the options say.

        Raises:
            AdaPrunerError: it cannot be met, or what meets it cannot be written in the format; with the numbers.
        """

        def counts_at(ratio: float) -> list[int]:
            return kept_counts(self.structure, self.budget(ratio))

        summary = self.vocabulary.summary if self.vocabulary else None
        least = summary.removed_parameters / summary.parameters_before if summary else 0.0
        ratio = target.ratio(counts_at, least)
        if is_gguf(self.config.target_format):
            scores = torch.zeros(self.structure.group_offsets[-1])
            check_gguf(prune_model(self.empty, self.structure, make_plan(self.structure, scores, counts_at(ratio))))
        return ratio

    def meet_target(self) -> None:
        """Sets the ratio of the config to the one that meets the target, if there is one; the first process finds it.

        Raises:
            AdaPrunerError: see `ratio_of_target`.
        """
        if self.config.target:
            ratio = self.ratio_of_target(self.target) if self.process.leads and self.target else 0.0
            self.config = self.config.model_copy(update={"ratio": (self.process.from_first(ratio),)})

    def budget(self, ratio: float) -> Budget:
        """What is to be removed at a ratio, from where the options say."""
        return reference_budget(self.config, self.structure, self.ratio_of_blocks(ratio))

    @property
    def _seq_len(self) -> int:
        """Tokens of the longest text."""
        return max(self.config.seq_len, self.config.recovery.seq_len if self.config.recover else 0)

    @cached_property
    def structure(self) -> Structure:
        possible = architecture_of(self.empty.config).layouts
        if self.config.layout not in possible:
            raise AdaPrunerError(
                f"the layers of a {self.empty.config.model_type} cannot be cut differently: set `layout` to"
                f" {possible[0]}"
            )
        return build_structure(self.empty, self.config.head_granularity, self.config.expert_granularity)

    @cached_property
    def tokenizer_given(self) -> Tokenizer:
        """The tokenizer of the given model, with all of its tokens."""
        return load_tokenizer(self.location)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with the tokens that are kept."""
        if self.vocabulary is None:
            return self.tokenizer_given
        parts = TokenizerParts.of(self.tokenizer_given)
        return cut_tokenizer(self.tokenizer_given, parts, self.vocabulary.new_ids)

    @cached_property
    def placement(self) -> Placement:
        """On which devices the layers are."""
        if self.config.layer_wise:
            check_streamable(self.location, self.empty.config)
        budget = self.budget(max(self.config.ratio))
        streamable = is_streamable(self.location, self.empty.config)
        devices = usable_devices(self.config.device)
        placement = choose_placement(self.config, self.empty, self.structure, budget, devices, streamable)
        if self.config.target_speed and (placement.layer_wise or len(placement.devices) > 1):
            where = "in memory one at a time" if placement.layer_wise else "on several devices"
            raise AdaPrunerError(
                f"`target_speed` is measured with all layers on one device, and here they are {where}: give a `ratio`"
            )
        return placement

    @property
    def layer_wise(self) -> bool:
        """Whether one decoder layer at a time is in memory."""
        return self.placement.layer_wise

    def room_for_moments(self, stage: str) -> dict[torch.device, int]:
        """Bytes that second moments may take while a stage uses them, by device; nothing where that cannot be told.

        Args:
            stage: one of those of `estimate_memory`.
        """
        if is_pruned(self.empty.config):
            return {}
        budget = self.budget(max(self.config.ratio))
        about = self.config, self.empty, self.structure, budget, self.device, self.layer_wise
        stages = estimate_memory(*about, len(self.placement.devices))
        return room_for_moments(self.device, stages[stage])

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return dtype_of_weights(self.empty, self.config.dtype)

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The dense model, loaded, with the tokens that are kept."""
        self.reporter.note(check_length(self.empty.config, self._seq_len) or "")
        with self.reporter.stage("loading"):
            model = self._load()
            if self.vocabulary:
                cut_vocabulary(model, self.vocabulary)
        return model

    def load_given(self) -> PreTrainedModel:
        """The given model with all of its tokens: loaded anew where `dense` has fewer, and kept by nobody."""
        if self.vocabulary is None:
            return self.dense
        with self.reporter.stage("loading"):
            return self._load()

    def _load(self) -> PreTrainedModel:
        return load_model(self.location, self.config.dtype, self.placement.device, self.layer_wise)

    @cached_property
    def fits_sequentially(self) -> bool:
        """Whether the pruned model is fitted once more, layer by layer."""
        config = self.empty.config
        possible = architecture_of(config).has_plain_residual(config)
        if self.config.sequential and not possible:
            raise AdaPrunerError(
                f"`sequential` is not possible for {config.model_type}, which scales or normalises the outputs of its"
                " blocks: leave it out, compensation is one-shot then"
            )
        return self.config.fits_sequentially and possible

    @property
    def tunes_scales(self) -> bool:
        """Whether scales of the pruned model are tuned: where that is possible, unless the options forbid it."""
        return self.config.tunes_scales and self._hinders_tuning is None

    def check_tuning(self) -> None:
        """Says so if the scales of the pruned model will not be tuned.

        Raises:
            AdaPrunerError: they cannot be, and the options ask for it.
        """
        if self.config.tunes_scales and (hindrance := self._hinders_tuning):
            if self.config.tune_scales:
                raise hindrance
            self.reporter.note(f"The scales of the pruned model will not be tuned: {hindrance}")

    @cached_property
    def _hinders_tuning(self) -> AdaPrunerError | None:
        placement = self.placement  # too little memory is refused, whether or not scales are tuned
        try:
            if placement.layer_wise or len(placement.devices) > 1:
                raise AdaPrunerError("`tune_scales` needs all layers on one device: leave it out")
            check_device(self.device)
            check_adapters(empty_model(self.empty.config), scale_options(self.config.seed, self.device))
        except AdaPrunerError as error:
            return error
        return None

    @cached_property
    def texts(self) -> Texts:
        return assign_texts(self.config, missing_ok=True)

    def self_windows(self, others: int) -> int:
        """How many windows the model writes for compensation. Layer by layer every token would read all weights.

        Args:
            others: how many there are of the calibration dataset.
        """
        config = self.config
        if config.self_windows is not None:
            return config.self_windows
        cannot = config.calibration == SELF_GENERATED or self.layer_wise or start_token(self.dense) is None
        return 0 if cannot else others // 2

    @property
    def level_rounds(self) -> int:
        """How many rounds of levelling there are at most. Layer by layer every layer would be read again and again."""
        default = 0 if self.layer_wise else _LEVEL_ROUNDS
        return default if self.config.level_rounds is None else self.config.level_rounds

    @cached_property
    def drawn(self) -> dict[str, Tensor]:
        """The windows of text by use, [windows, tokens] each, int64; without those that the model writes itself."""
        sources = {"pool": self.texts.pool, "objective": self.texts.objective}
        counts, config = window_counts(self.config), self.config
        at_least = {"pool": config.pool, "objective": config.scoring_windows[0]}
        windows = {
            use: draw_windows(source, self.tokenizer, counts[use], config.seq_len, config.seed, at_least[use])
            for use, source in sources.items()
            if source is not None
        }
        if self.texts.pool is not None and "compensation" in counts:
            text = text_windows(self.texts.pool, self.tokenizer, config.seq_len)
            windows["compensation"] = evenly_spaced(text, counts["compensation"])
            if len(text) < 2:
                raise AdaPrunerError(
                    f"{self.texts.pool} gives one window of {config.seq_len} tokens, compensation needs 2"
                )
        for one in windows.values():
            check_tokens(self.empty.config, int(one.max()))
        return windows

    @cached_property
    def examples(self) -> Examples | None:
        """What the pruned model is trained on; None where the dense model writes it."""
        check_device(self.device)
        size, processes = self.config.recovery.batch_size, self.process.count
        if size % processes:
            raise AdaPrunerError(f"`recovery.batch_size` {size} cannot be divided among {processes} processes")
        if self.texts.recovery is None:
            return None
        examples = read_examples(self.texts.recovery, self.tokenizer, self.config.recovery)
        check_tokens(self.empty.config, examples.largest_token)
        return examples

    @cached_property
    def report(self) -> dict[str, EvaluationText]:
        """What perplexity is reported on, by name."""
        return self._report(self.tokenizer, self.empty.config)

    @cached_property
    def report_given(self) -> dict[str, EvaluationText]:
        """The same for the given model, with all of its tokens."""
        return self._report(self.tokenizer_given, self.config_given)

    def _report(self, tokenizer: Tokenizer, of_model: PreTrainedConfig) -> dict[str, EvaluationText]:
        config = self.config
        report = {
            name: evaluation_text(source, tokenizer, config.seq_len, report_windows(config), bos=config.evaluate_bos)
            for name, source in self.texts.report.items()
        }
        for text in report.values():
            check_tokens(of_model, int(text.windows.max()))
        return report

    @cached_property
    def tasks(self) -> Tasks:
        """Tasks of lm-eval, without the items whose text the model is calibrated or trained on."""
        return load_tasks(self.config.tasks, self.config.task_limit, self.texts.used_documents())

    def check_objective(self) -> None:
        """Refuses to judge trials without the function that is to judge them."""
        if self.config.objective_function and self.item_losses is None:
            raise AdaPrunerError(
                f"the trials of this run are judged by a Python function ({self.config.objective_function}): call"
                " adapruner.prune with the same function as `objective`"
            )

    def check_storage(self) -> None:
        """Refuses a database that cannot be opened."""
        if self.storage is not None:
            self.study("").check()

    def study(self, key: str) -> StudyPlace:
        """Where the trials of the search with this key are kept."""
        return StudyPlace(self.storage or sqlite_url(self.folder.study), key)

    def left_out(self, keys: dict[str, str]) -> dict[str, list[int]]:
        """The windows on which the loss of the dense model is not finite, by use.

        Args:
            keys: of the artifacts, by name.
        """
        for folder in (self.folder, *self.others):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                content = json.loads(folder.left_out.read_text(encoding="utf-8"))
                if content["of"] == [keys["windows.safetensors"], self.leaves["precision"]]:
                    left_out: dict[str, list[int]] = content["windows"]
                    return left_out
        return {}

    def leave_out(self, keys: dict[str, str], windows: dict[str, list[int]]) -> None:
        """Keeps note of windows on which the loss of the dense model is not finite."""
        content = json.dumps({"of": [keys["windows.safetensors"], self.leaves["precision"]], "windows": windows})
        write_atomically(self.folder.left_out, lambda partial: partial.write_text(content, encoding="utf-8"))

    @cached_property
    def leaves(self) -> dict[str, Any]:
        """The inputs that no artifact gives, as JSON, but for `left_out`; the content of a text that is not at hand is
        None."""
        # The commit of a Hub model is known once its config is here.
        family = architecture_of(load_config(self.location))
        # Free memory decides none of these.
        precision = {
            "dtype": str(self.dtype),
            "dtype of trials": str(trial_dtype(self.dtype, self.device)),
            "device": self.device.type,
            "layer_wise": self.layer_wise,
        }
        return {
            "model": fingerprint_of_model(self.location),
            "family": family.model_dump_json(),
            # What the model writes depends on how it computes.
            "pool_text": _leaf_of_text(self.texts.pool) or precision,
            "objective_text": _leaf_of_text(self.texts.objective) or precision,
            "report_texts": {name: _leaf_of_text(source) for name, source in self.texts.report.items()},
            "precision": precision,
            # How many devices there are, and which, decides whether they can be.
            "tuning_of_scales": self.tunes_scales,
            "terms": {name: _leaf_of_term(term) for name, term in TERMS.items()},
            "recovery_text": _leaf_of_text(self.texts.recovery),
            "vocabulary_texts": self._vocabulary_leaf,
        }


def _leaf_of_term(term: Term) -> list[Any]:
    """What a term is; of one from outside this package, with what tells its code from another."""
    code = list[str]()
    if not term.function.__module__.startswith("adapruner."):
        with contextlib.suppress(AdaPrunerError):  # defined on a prompt, which no later run is from
            code = [name_of_code(term.function)]
    return [term.family, term.share, sorted(term.needs), *code]


def _leaf_of_text(source: Source | None) -> dict[str, str | None] | None:
    if source is None:
        return None
    columns = f":{source.columns}" if source.columns else ""
    return {"text": f"{source.identity}{columns}@{source.part}", "content": fingerprint(source)}


@dataclass(frozen=True)
class Job:
    """The making of the artifacts of one ratio.

    Attributes:
        config: the options, with this ratio alone.
        folder: where the artifacts of this ratio are.
        prepared: what is the same for all ratios.
        keys: the keys of all artifacts, by name.
    """

    config: PruneConfig
    folder: RunFolder
    prepared: Preparation
    keys: dict[str, str]

    def budget(self, ratio: float) -> Budget:
        """What is to be removed at a ratio, from where the options say."""
        return self.prepared.budget(ratio)


def register_extensions(config: PruneConfig) -> None:
    """Adds the datasets and families of the user's files, and what the user's plugins register, to the shipped ones,
    for this process."""
    load_plugins(config.plugins)
    if config.sources:
        register_sources(Path(config.sources))
    if config.architectures:
        register_architectures(Path(config.architectures))


def needs_moments(config: PruneConfig) -> bool:
    """Whether second moments are measured."""
    return config.compensation != "none" or "moments" in needed_statistics(config.space, config.terms)


def window_counts(config: PruneConfig) -> dict[str, int]:
    """How many windows there are for each use; for the objective, with those for the final choice."""
    counts = {"pool": config.pool, "objective": config.scoring_windows[1] + config.final_windows}
    if needs_moments(config):
        counts["compensation"] = config.compensation_windows
    return counts
