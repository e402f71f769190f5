"""The whole procedure: every artifact of a run, how it is made and from what, from windows of text to the report."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.artifacts import Artifact, Form, artifact
from adapruner.calibration import (
    OPENINGS,
    SELF_GENERATED,
    EvaluationText,
    generate_windows,
    load_texts,
    probe_texts,
    save_texts,
)
from adapruner.callbacks import tell
from adapruner.card import model_card
from adapruner.checkpoint import save_checkpoint, write_card
from adapruner.config import PruneConfig, WholePart
from adapruner.costs import Latencies, TargetOutcome, bytes_of_model, cache_bytes, dtype_in, is_gguf, timer
from adapruner.errors import AdaPrunerError, NonFiniteError
from adapruner.evaluation import (
    Breakage,
    Perplexity,
    TaskScore,
    agreement,
    compute_prefix,
    continue_greedily,
    log_probabilities,
    losses_by_batch,
    measure_perplexity,
    measure_tasks,
    repetition,
)
from adapruner.files import write_atomically
from adapruner.importance import needed_statistics
from adapruner.job import LATENCIES, VOCABULARY, Job, needs_moments, window_counts
from adapruner.measurement import (
    HeldMoments,
    InputMoments,
    Statistics,
    StoredMoments,
    measure_in_parts,
    measure_moments,
    projected_blocks,
    removal_errors,
)
from adapruner.memory import MEASURED_AT_ONCE, TOKENS_FOR_COSTS, TOKENS_FOR_WHOLE, windows_of
from adapruner.models import Whole, describe_device, empty_model, find_model, in_fastest_dtype, load_config, load_model
from adapruner.planning import MOST_CHANNELS, PruningPlan, Target, kept_counts, largest_channel_share
from adapruner.progress import Advance
from adapruner.recovery import DEFAULT_GENERATED_RECORDS, read_record, recover_into, total_steps, window_examples
from adapruner.report import render_report
from adapruner.result import TITLES, ForeignVocabulary, ModelNumbers, Role, RunResult, shown_name, verdict_of
from adapruner.search import (
    MOST_PROTECTED_FIRST,
    MOST_WHOLE,
    Candidate,
    Levelled,
    Objective,
    RemovalOrders,
    Search,
    SearchResult,
    SearchSpace,
    TriedPoint,
    build_subset_family,
    is_feasible,
    level,
    plan_candidate,
    removal_orders,
    scores_of,
)
from adapruner.structure import Structure, build_structure
from adapruner.surgery import Compensation, prune_model, refit_sequentially
from adapruner.tokens import Vocabulary, foreign_tokens

_WRITTEN_AT_ONCE = 64
# What decides how much is removed; a ratio alone leaves the others as they are.
_BUDGET = "ratio target_size target_memory target_speed target_format target_phase target_batch target_context"
# Tokens per window of the built-in texts, of which there is little.
_PROBED_TOKENS = 128
Windows = dict[str, Tensor]
Moments = StoredMoments | None


def _json(content: Any) -> Form[Any]:
    adapter: TypeAdapter[Any] = TypeAdapter(content)
    return Form(
        lambda value, path: path.write_bytes(adapter.dump_json(value, indent=2) + b"\n"),
        lambda path: adapter.validate_json(path.read_bytes()),
    )


TENSORS: Form[Windows] = Form(save_file, load_file)
# What made it has written the folder already.
FOLDER: Form[Path] = Form(shutil.move, Path)
MOMENTS: Form[StoredMoments] = Form(lambda moments, path: shutil.move(moments.folder, path), StoredMoments)
STATISTICS: Form[Statistics] = Form(Statistics.save, Statistics.load)
PLAN: Form[PruningPlan] = Form(PruningPlan.save, PruningPlan.load)
REPORT_TEXTS: Form[dict[str, EvaluationText]] = Form(save_texts, load_texts)
PAGE: Form[str] = Form(
    lambda page, path: path.write_text(page, encoding="utf-8"), lambda path: path.read_text(encoding="utf-8")
)


@artifact(
    VOCABULARY,
    _json(Vocabulary),
    options="vocabulary_size vocabulary_multiple",
    leaves="model vocabulary_texts",
    check=lambda job: job.prepared.vocabulary,
    is_wanted=lambda config: bool(config.vocabulary),
    is_result=False,
)
def vocabulary(job: Job, work: Path) -> Vocabulary | None:
    """The tokens that are kept. Everything from here on is of the model and the tokenizer with these alone."""
    return job.prepared.vocabulary


@artifact(
    "windows.safetensors",
    TENSORS,
    inputs=(vocabulary,),
    options="pool objective_windows final_windows compensation_windows seq_len seed compensation space",
    leaves="model pool_text objective_text",
    check=lambda job: job.prepared.drawn,
    is_result=False,
    version=2,
)
def windows(job: Job, work: Path, vocabulary: Vocabulary | None) -> Windows:
    """The windows of every use, [windows, tokens] each, int64; the dense model writes those that it is to write."""
    prepared, config = job.prepared, job.config
    windows = dict(prepared.drawn)
    for number, (use, count) in enumerate(window_counts(config).items()):
        if use not in windows:
            with prepared.reporter.stage(f"writing {use}"):
                windows[use] = generate_windows(prepared.dense, count, config.seq_len, 4 * config.seed + number)
    return windows


@artifact(
    "evaluation/texts.safetensors",
    REPORT_TEXTS,
    inputs=(vocabulary,),
    options="evaluate evaluate_windows evaluate_bos seq_len",
    leaves="model report_texts",
    check=lambda job: job.prepared.report,
    is_result=False,
)
def report_texts(job: Job, work: Path, vocabulary: Vocabulary | None) -> dict[str, EvaluationText]:
    """The windows that perplexity is reported on, by the name of their text; kept, so that no text is needed later."""
    return job.prepared.report


@artifact(
    "evaluation/texts-dense.safetensors",
    REPORT_TEXTS,
    options="evaluate evaluate_windows evaluate_bos seq_len",
    leaves="model report_texts",
    check=lambda job: job.prepared.report_given,
    is_wanted=lambda config: bool(config.vocabulary),
    is_result=False,
)
def report_texts_dense(job: Job, work: Path) -> dict[str, EvaluationText]:
    """The same text in the tokens of the given model, where the pruned one has fewer."""
    return job.prepared.report_given


@artifact(
    "self.safetensors",
    TENSORS,
    inputs=(windows,),
    options="self_windows calibration seq_len seed",
    leaves="model precision",
    is_wanted=lambda config: needs_moments(config) and config.self_windows != 0,
    is_result=False,
)
def self_written(job: Job, work: Path, windows: Windows) -> Windows:
    """Windows that the dense model writes for compensation, which is fitted on them as well: text of other kinds than
    that of the calibration dataset. Those on which its loss is not finite are dropped."""
    prepared, config = job.prepared, job.config
    count = prepared.self_windows(len(windows["compensation"]))
    if not count:
        return {"compensation": torch.empty(0, config.seq_len, dtype=torch.int64)}
    with prepared.reporter.stage("writing text", count) as advance:
        number = list(window_counts(config)).index("compensation")
        fast, seed = in_fastest_dtype(prepared.dense), 4 * config.seed + number
        written = generate_windows(fast, count, config.seq_len, seed, _WRITTEN_AT_ONCE, advance)
        finite = torch.cat(list(losses_by_batch(fast, written))).isfinite()
    return {"compensation": written[finite]}


@artifact(
    "moments",
    MOMENTS,
    inputs=(windows, self_written),
    options="self_windows head_granularity expert_granularity",
    leaves="model family precision left_out",
    is_wanted=needs_moments,
    is_result=False,
)
def moments(job: Job, work: Path, windows: Windows, written: Windows | None) -> StoredMoments:
    """Second moments of all blocks; those of finished blocks are kept."""
    moments, prepared = StoredMoments(work), job.prepared
    missing = [index for index in projected_blocks(prepared.structure) if not moments.path(index).is_file()]
    if missing:
        text, fast = _text_to_fit(job, windows, written), in_fastest_dtype(prepared.dense)
        with prepared.reporter.stage("reading activations", prepared.structure.layers) as advance:
            for index, block_moments in measure_moments(fast, prepared.structure, text, missing, progress=advance):
                write_atomically(moments.path(index), block_moments.save)
    return moments


def _text_to_fit(job: Job, windows: Windows, written: Windows | None) -> Tensor:
    """[windows, tokens], int64: what compensation is fitted on, mixed, because some of it is held out."""
    text = usable(job, windows)["compensation"]
    both = torch.cat([text, written["compensation"]]) if written else text
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(job.config.seed))]


@artifact(
    "statistics.safetensors",
    STATISTICS,
    inputs=(windows, moments),
    options="terms space head_granularity expert_granularity",
    leaves="model family precision left_out",
    is_result=False,
    is_shared=True,
)
def statistics(job: Job, work: Path, windows: Windows, moments: Moments) -> Statistics | None:
    """Statistics of the pool, measured part by part; of several processes, each measures its share."""
    prepared, pool = job.prepared, usable(job, windows)["pool"]
    size = MEASURED_AT_ONCE[prepared.layer_wise]
    parts = {start: work / f"{start:06}.safetensors" for start in range(0, len(pool), size)}
    own = list(parts)[prepared.process.rank :: prepared.process.count]
    missing = [start for start in own if not parts[start].is_file()]
    with prepared.reporter.stage("measuring", len(own)) as advance:
        advance(len(own) - len(missing))
        for start, part in measure_in_parts(
            prepared.dense,
            prepared.structure,
            pool,
            size,
            terms=job.config.terms,
            layer_wise=prepared.layer_wise,
            folder=work,
            starts=missing,
        ):
            write_atomically(parts[start], part.save)
            advance()
    prepared.process.wait()
    if not prepared.process.leads:
        return None
    statistics = Statistics.concatenate([Statistics.load(path) for path in parts.values()])
    if moments is not None and "moments" in needed_statistics(job.config.space, job.config.terms):
        with prepared.reporter.stage("comparing removals", len(moments)) as advance:
            alone, eliminated = removal_errors(prepared.dense, prepared.structure, moments, advance)
        statistics = replace(statistics, removal_error=alone, elimination_error=eliminated)
    return statistics


def _may_remove_whole(config: PruneConfig) -> bool:
    return config.space == "extended" and config.search == "joint" and config.whole != ("none",)


def _whole_parts(job: Job) -> list[Whole]:
    """What of a layer the search may remove whole.

    Raises:
        AdaPrunerError: the options name a part that no layer of this model can lose.
    """
    config, structure = job.config, job.prepared.structure
    by_default: tuple[WholePart, ...] = ("layer",) if config.layout == "uniform" else ("attention",)
    for part in config.whole or ():
        if part not in structure.whole:
            possible = ", ".join(sorted(structure.whole)) or "none"
            raise AdaPrunerError(
                f"`whole` {part}: models of the family {structure.model_type} cannot lose it; possible: {possible}"
            )
    return [part for part in get_args(Whole) if part in structure.whole and part in (config.whole or by_default)]


@artifact(
    "whole.json",
    _json(RemovalOrders),
    inputs=(windows,),
    options="whole layout space search protect_first protect_last",
    leaves="model family precision left_out",
    is_wanted=_may_remove_whole,
    check=_whole_parts,
    is_result=False,
    version=2,
)
def whole(job: Job, work: Path, windows: Windows) -> RemovalOrders:
    """In which order attentions, feed-forwards and layers are removed whole."""
    prepared, config = job.prepared, job.config
    structure, parts = prepared.structure, _whole_parts(job)
    unprotected = range(config.protect_first or 0, structure.layers - (config.protect_last or 0))
    candidates = {part: sorted(structure.whole_parameters(part).keys() & set(unprotected)) for part in parts}
    text = usable(job, windows)["pool"][: windows_of(TOKENS_FOR_WHOLE, config)]
    with prepared.reporter.stage("removing parts whole", MOST_WHOLE * len(parts)) as advance:
        return removal_orders(in_fastest_dtype(prepared.dense), structure, text, candidates, advance)


@artifact(
    "search.json",
    _json(SearchResult),
    inputs=(windows, moments, statistics, whole),
    options="searched_ratio ratio_of samples objective_windows objective_function selection trials sampler search"
    " alignment terms reduction space layout whole protect_first protect_last head_granularity expert_granularity"
    " head_share round_to compensation seed",
    leaves="model family precision left_out terms",
    check=lambda job: (
        job.prepared.check_storage(),
        job.prepared.check_objective(),
        job.budget(job.config.searched_ratio),
    ),
    is_shared=True,
    version=4,
)
def search(
    job: Job, work: Path, windows: Windows, moments: Moments, statistics: Statistics, orders: RemovalOrders | None
) -> SearchResult | None:
    """The search; of several processes, the first leads it and the others run trials."""
    prepared, config = job.prepared, job.config
    fast, text = in_fastest_dtype(prepared.dense), usable(job, windows)["objective"]
    if not all(losses.isfinite().all() for losses in losses_by_batch(fast, text)):
        raise NonFiniteError("the loss of the model is not finite on the text of the objective")
    judge = partial(_judge, job, fast, _held(job, moments), statistics)
    search = _search(job, statistics, orders, judge(text[: config.objective_windows]))
    if not prepared.process.leads:
        with prepared.reporter.stage("running trials"):
            search.help()
        return None
    with prepared.reporter.stage("searching", config.trials) as advance:
        search.run(partial(_report_trial, job, advance))
        further = text[config.objective_windows :]
        judges_further = len(further) and not prepared.item_losses
        return search.result(judge(further) if judges_further else None)


def _report_trial(job: Job, advance: Advance, trial: TriedPoint, best: float) -> None:
    advance(1, text=f"best {'objective' if job.config.objective_function else job.config.selection} {best:.4f}")
    for callback in job.prepared.callbacks:
        callback.on_trial(trial)


def _search(job: Job, statistics: Statistics, orders: RemovalOrders | None, judge: Objective) -> Search:
    config, structure, budget = job.config, job.prepared.structure, job.budget(job.config.searched_ratio)
    fixed = [name for name in ("protect_first", "protect_last", "head_share") if getattr(config, name) is not None]
    space = SearchSpace(
        subsets=build_subset_family(statistics, structure, kept_counts(structure, budget)),
        samples=config.samples,
        seed=config.seed,
        budget=budget,
        name=config.space,
        fixed_allocation=frozenset(fixed),
        alignment=config.alignment,
        reduction=config.reduction,
        terms=config.terms,
        searched=config.search,
        is_feasible=partial(is_feasible, structure, statistics),
        experts=_what_ranks_experts(structure, statistics),
        whole=orders.shortened(structure, budget.ratio) if orders else {},
    )
    place = job.prepared.study(job.keys["search.json"])
    together = judge.together if job.prepared.layer_wise and not judge.item_losses else None
    return Search(space, judge, config.trials, config.seed, place, config.sampler, judge_together=together)


def _what_ranks_experts(structure: Structure, statistics: Statistics) -> Literal["none", "routing", "taylor"]:
    if not structure.has_experts:
        return "none"
    is_known = statistics.routed_share is not None and bool(statistics.routed_share.any())
    return "routing" if is_known else "taylor"


def _held(job: Job, moments: Moments) -> HeldMoments | None:
    """The moments for stages that use them many times."""
    return None if moments is None else HeldMoments(moments, job.prepared.room_for_moments())


def _judge(
    job: Job, fast: PreTrainedModel, moments: HeldMoments | None, statistics: Statistics, windows: Tensor
) -> Objective:
    config, structure, reused = job.config, job.prepared.structure, 0
    compensation = _compensation(config, moments)
    if item_losses := job.prepared.item_losses:
        return Objective(fast, structure, statistics, windows, compensation, item_losses=item_losses)
    if config.layout == "per-layer":
        reused = min(structure.layers, max(MOST_PROTECTED_FIRST, config.protect_first or 0))
    return Objective(
        fast,
        structure,
        statistics,
        windows,
        compensation,
        compute_prefix(fast, windows, reused) if reused else None,
        log_probabilities(fast, windows) if config.selection == "kl" else None,
    )


def _compensation(config: PruneConfig, moments: Mapping[int, InputMoments] | None) -> Compensation | None:
    return None if config.compensation == "none" or moments is None else Compensation(config.compensation, moments)


def _check_levelling(job: Job) -> None:
    if job.prepared.level_rounds:
        job.prepared.check_objective()
    if job.prepared.layer_wise and job.prepared.level_rounds:
        raise AdaPrunerError("levelling needs all layers in memory: set `level_rounds` 0 with `layer_wise`")


@artifact(
    "levelled.json",
    _json(Levelled),
    inputs=(windows, moments, statistics, search),
    options=f"{_BUDGET} level_rounds",
    leaves="model family precision left_out",
    is_wanted=lambda config: config.levels_widths,
    check=_check_levelling,
    is_result=False,
)
def levelled(
    job: Job, work: Path, windows: Windows, moments: Moments, statistics: Statistics, search: SearchResult
) -> Levelled:
    """The chosen candidate at the ratio, with its widths levelled: costs are measured on the pool, and the windows of
    the objective decide what is accepted."""
    prepared, config, text = job.prepared, job.config, usable(job, windows)
    pool, rounds = text["pool"][: windows_of(TOKENS_FOR_COSTS, config)], prepared.level_rounds
    fast, candidate = in_fastest_dtype(prepared.dense), candidate_at_ratio(job, statistics, search.best)
    compensation = _compensation(config, _held(job, moments))
    objective = Objective(
        fast, prepared.structure, statistics, text["objective"], compensation, item_losses=prepared.item_losses
    )
    channels = sum(block.kind == "channels" and not block.experts for block in prepared.structure.blocks)
    if not rounds:
        return Levelled(candidate=candidate, rounds=())
    with prepared.reporter.stage("levelling widths", channels * rounds) as advance:
        return level(objective, pool, candidate, rounds, advance)


@artifact(
    "plan.json",
    PLAN,
    inputs=(statistics, search, levelled),
    options=f"{_BUDGET} level_rounds",
    check=lambda job: job.budget(job.config.ratio[0]),
)
def plan(job: Job, work: Path, statistics: Statistics, search: SearchResult, levelled: Levelled | None) -> PruningPlan:
    """The plan of the chosen candidate."""
    # Widths that were moved may cost something else.
    candidate = candidate_at_ratio(job, statistics, levelled.candidate if levelled else search.best)
    return plan_candidate(job.prepared.structure, statistics, candidate)


def candidate_at_ratio(job: Job, statistics: Statistics, found: Candidate) -> Candidate:
    """A candidate at the ratio of the job, or at the one with which it meets the target; where its allocation cannot do
    so, or only by taking a layer apart, with the allocation that the job starts from."""
    structure, ratio = job.prepared.structure, job.prepared.ratio_of_blocks(job.config.ratio[0])
    with contextlib.suppress(AdaPrunerError):
        if target := job.prepared.target:
            scores = scores_of(structure, statistics, found)
            ratio = target.ratio(lambda ratio: kept_counts(structure, replace(found.budget, ratio=ratio), scores))
        if found.budget.ratio == ratio:
            return found
        at_ratio = found.model_copy(update={"budget": replace(found.budget, ratio=ratio)})
        plan = plan_candidate(structure, statistics, at_ratio)
        if largest_channel_share(structure, [len(block.kept) for block in plan.blocks]) <= MOST_CHANNELS:
            return at_ratio
    return found.model_copy(update={"budget": job.budget(job.config.ratio[0])})


@artifact(
    "model",
    FOLDER,
    inputs=(windows, self_written, moments, plan),
    options="compensation sequential",
    leaves="model family precision left_out",
    check=lambda job: job.prepared.fits_sequentially,
    version=2,
)
def model(job: Job, work: Path, windows: Windows, written: Windows | None, moments: Moments, plan: PruningPlan) -> Path:
    """The dense model, cut by the plan, compensated, and saved."""
    prepared, compensation = job.prepared, _compensation(job.config, moments)
    with prepared.reporter.stage("cutting"):
        pruned = prune_model(prepared.dense, prepared.structure, plan, compensation)
    if compensation and prepared.fits_sequentially:
        with prepared.reporter.stage("compensating", prepared.structure.layers) as advance:
            text = _text_to_fit(job, windows, written)
            refit_sequentially(prepared.dense, pruned, prepared.structure, plan, compensation, text, advance)
    with prepared.reporter.stage("saving"):
        origin = _origin(job, plan)
        # Another model is fine-tuned, or none yet.
        origin["texts"] = [text for text in origin["texts"] if text["use"] != "recovery"]
        save_checkpoint(pruned, prepared.tokenizer, work / "model", record=origin)
    return work / "model"


def _origin(job: Job, plan: PruningPlan) -> dict[str, Any]:
    """What a checkpoint says of its making: the base model, and the texts that it was made with."""
    return {"base_model": shown_name(job.config.model), "texts": job.prepared.texts.as_records(), "plan": plan.hash}


@artifact(
    LATENCIES,
    _json(Latencies),
    options="target_phase target_batch target_context head_granularity",
    leaves="model precision",
    is_wanted=lambda config: config.target_speed is not None,
    is_result=False,
)
def latencies(job: Job, work: Path) -> Latencies:
    """What layers take on this machine, by which the target was resolved."""
    return job.prepared.latencies


@artifact(
    "target.json",
    _json(TargetOutcome),
    inputs=(latencies, plan, model),
    options=_BUDGET,
    leaves="model precision",
    is_wanted=lambda config: config.target is not None,
    is_result=False,
)
def target(job: Job, work: Path, latencies: Latencies | None, plan: PruningPlan, model: Path) -> TargetOutcome | None:
    """How well the saved model meets the target."""
    aim = job.prepared.target
    if aim is None:
        return None
    reached = _measured_cost(job, aim, model) if latencies else float(_bytes_of_saved(job, model))
    return TargetOutcome(
        option=aim.option,
        unit=aim.unit,
        dense=aim.shown(aim.dense),
        asked=aim.shown(aim.most),
        predicted=aim.shown(aim.costs([len(block.kept) for block in plan.blocks])),
        reached=aim.shown(reached),
    )


def _measured_cost(job: Job, aim: Target, model: Path) -> float:
    """Seconds of the saved model, for as many as were predicted for the dense one: both are measured in turn."""
    config, prepared = job.config, job.prepared
    models = {"dense": prepared.dense, "pruned": load_model(find_model(str(model)), "auto", config.device)}
    with prepared.reporter.stage("timing"):
        seconds = timer(config.target_phase, config.target_batch, config.tokens_of_target)(models)
    return aim.dense * seconds["pruned"] / seconds["dense"]


def _bytes_of_saved(job: Job, model: Path) -> int:
    """Of the file that was written, or that an export would write, and of the cache where the target is memory."""
    config, prepared = job.config, job.prepared
    dtype = dtype_in(config.target_format, prepared.dtype)
    empty = empty_model(load_config(find_model(str(model))))
    size = bytes_of_model(empty, prepared.tokenizer, config.target_format, prepared.dtype)
    if not is_gguf(config.target_format) and dtype == prepared.dtype:
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if config.target_memory:
        size += sum(cache_bytes(empty, config.target_batch, config.tokens_of_target, dtype))
    return size


@artifact(
    "recovery.safetensors",
    TENSORS,
    inputs=(vocabulary,),
    options="recovery seed",
    leaves="model precision",
    is_wanted=lambda config: config.recover == SELF_GENERATED,
    is_result=False,
)
def training_windows(job: Job, work: Path, vocabulary: Vocabulary | None) -> Windows:
    """Text that the dense model writes for the pruned model to be fine-tuned on."""
    settings, prepared = job.config.recovery, job.prepared
    with prepared.reporter.stage("writing recovery"):
        count = settings.records or DEFAULT_GENERATED_RECORDS
        windows = generate_windows(prepared.dense, count, settings.seq_len, 4 * job.config.seed + 3)
    return {"recovery": windows}


@artifact(
    "recovered",
    FOLDER,
    inputs=(plan, model, training_windows),
    options="recover recovery",
    leaves="model precision recovery_text",
    check=lambda job: job.prepared.examples,
    is_wanted=lambda config: config.recover is not None,
    is_shared=True,
    version=2,
)
def recovered(job: Job, work: Path, plan: PruningPlan, model: Path, written: Windows | None) -> Path:
    """The saved model, fine-tuned on the text or on what the dense model predicts, by all processes together."""
    config, prepared = job.config, job.prepared
    examples = prepared.examples or window_examples((written or {})["recovery"], SELF_GENERATED, config.recovery)
    pruned = load_model(find_model(str(model)), "auto", config.device)
    # Of text that the model wrote itself there is nothing to learn but its predictions.
    learns_labels = config.recovery.learns_labels(examples.instructions, config.recover == SELF_GENERATED)
    try:
        with prepared.reporter.stage("recovering", total_steps(examples, config.recovery)) as advance:
            recover_into(
                work / "model",
                pruned,
                prepared.tokenizer,
                examples,
                config.recovery,
                None if learns_labels else prepared.dense,
                {"model": config.model, "data": config.recover, **config.recovery.model_dump(mode="json")},
                work=work / "training",
                origin=_origin(job, plan),
                progress=advance,
                track=partial(tell, prepared.callbacks),
            )
    except AdaPrunerError as error:
        raise AdaPrunerError(
            f"{error}. The pruned model is complete: adapruner recover {model} trains it with other options"
        ) from None
    return work / "model"


# What each model that is evaluated is made from.
_EVALUATED: dict[Role, tuple[Artifact[Any], ...]] = {
    "dense": (),
    "best_fixed": (statistics, search),
    "searched": (model,),
    "recovered": (recovered,),
}


def _is_evaluated(role: Role, config: PruneConfig) -> bool:
    return role != "recovered" or config.recover is not None


def _has_tasks(role: Role, config: PruneConfig) -> bool:
    return bool(config.tasks) and _is_evaluated(role, config)


def _measure_perplexity(
    role: Role, job: Job, work: Path, texts: dict[str, EvaluationText], *inputs: Any
) -> dict[str, Perplexity]:
    """The perplexity of a model on every text of the report, by name."""
    evaluated = _model_to_evaluate(job, role, inputs)
    if role == "dense" and inputs[0] is not None:
        texts = inputs[0]
    windows = sum(len(text.windows) for text in texts.values())
    with job.prepared.reporter.stage("evaluating", windows) as advance:
        return {
            name: measure_perplexity(evaluated, text.windows, name, advance, **text.about)
            for name, text in texts.items()
        }


@artifact(
    "evaluation/continuations.safetensors",
    TENSORS,
    inputs=(vocabulary,),
    leaves="model precision",
    is_result=False,
)
def continuations(job: Job, work: Path, vocabulary: Vocabulary | None) -> Windows:
    """How the dense model continues the built-in openings, [openings, tokens], int64, in the tokens that are kept; none
    layer by layer, where every generated token would read all weights."""
    prepared = job.prepared
    if prepared.layer_wise:
        return {}
    with prepared.reporter.stage("looking for breakage"):
        return {"dense": continue_greedily(in_fastest_dtype(prepared.dense), prepared.tokenizer, OPENINGS)}


def _measure_breakage(role: Role, job: Job, work: Path, of_dense: Windows, *inputs: Any) -> Breakage:
    """Signs that a model is broken, where the dense model's continuations were made with those of its own."""
    prepared, own = job.prepared, of_dense.get("dense")
    agreed = None if own is None else 1.0
    evaluated = in_fastest_dtype(_model_to_evaluate(job, role, inputs))
    tokenizer = prepared.tokenizer_given if role == "dense" else prepared.tokenizer
    texts = probe_texts(tokenizer, min(job.config.seq_len, _PROBED_TOKENS))
    windows = sum(len(text.windows) for text in texts.values())
    with prepared.reporter.stage("looking for breakage", windows) as advance:
        if own is not None and role != "dense":
            agreed = agreement(evaluated, own)
            own = continue_greedily(evaluated, tokenizer, OPENINGS)
        return Breakage(
            repetition=None if own is None else repetition(own),
            agreement=agreed,
            texts={
                name: measure_perplexity(evaluated, text.windows, name, advance, **text.about)
                for name, text in texts.items()
            },
        )


def _measure_tasks(role: Role, job: Job, work: Path, *inputs: Any) -> dict[str, TaskScore]:
    """The scores of a model in every task, by name."""
    tasks, evaluated = job.prepared.tasks, in_fastest_dtype(_model_to_evaluate(job, role, inputs))
    tokenizer = job.prepared.tokenizer_given if role == "dense" else job.prepared.tokenizer
    with job.prepared.reporter.stage("running tasks", len(tasks)) as advance:
        return {score.task: score for score in measure_tasks(evaluated, tokenizer, tasks, advance)}


def _model_to_evaluate(job: Job, role: Role, inputs: tuple[Any, ...]) -> PreTrainedModel:
    prepared = job.prepared
    if role == "dense":
        return prepared.load_given()
    if role == "best_fixed":
        # As that metric is used elsewhere: without compensation, though its trial was compensated as all are.
        found, structure = candidate_at_ratio(job, inputs[0], inputs[1].best_fixed), prepared.structure
        return prune_model(prepared.dense, structure, plan_candidate(structure, inputs[0], found))
    return load_model(find_model(str(inputs[0])), "auto", job.config.device, prepared.layer_wise)


perplexity: dict[Role, Artifact[dict[str, Perplexity]]] = {
    role: artifact(
        f"evaluation/perplexity-{role}.json",
        _json(dict[str, Perplexity]),
        inputs=(report_texts, *([report_texts_dense] if role == "dense" else inputs)),
        options=_BUDGET if role == "best_fixed" else "",
        leaves="model precision",
        is_wanted=partial(_is_evaluated, role),
        is_result=False,
    )(partial(_measure_perplexity, role))
    for role, inputs in _EVALUATED.items()
}
scores: dict[Role, Artifact[dict[str, TaskScore]]] = {
    role: artifact(
        f"evaluation/tasks-{role}.json",
        _json(dict[str, TaskScore]),
        inputs=_EVALUATED[role],
        options="tasks task_limit",
        leaves="model precision pool_text objective_text recovery_text",
        check=lambda job: job.prepared.tasks,
        is_wanted=partial(_has_tasks, role),
        is_result=False,
    )(partial(_measure_tasks, role))
    for role in _EVALUATED
    if role != "best_fixed"
}

breakage: dict[Role, Artifact[Breakage]] = {
    role: artifact(
        f"evaluation/breakage-{role}.json",
        _json(Breakage),
        inputs=(continuations, *_EVALUATED[role]),
        options="seq_len",
        leaves="model precision",
        is_wanted=partial(_is_evaluated, role),
        is_result=False,
        version=2,
    )(partial(_measure_breakage, role))
    for role in _EVALUATED
    if role != "best_fixed"
}


@artifact(
    "result.json",
    _json(RunResult),
    inputs=(
        windows,
        self_written,
        search,
        levelled,
        plan,
        model,
        target,
        recovered,
        *perplexity.values(),
        *scores.values(),
        *breakage.values(),
    ),
    beside=("model/README.md", "recovered/README.md"),
)
def result(
    job: Job,
    work: Path,
    windows: Windows,
    written: Windows | None,
    search: SearchResult,
    levelled: Levelled | None,
    plan: PruningPlan,
    model: Path,
    target: TargetOutcome | None,
    recovered: Path | None,
    *measured: Any,
) -> RunResult:
    """All numbers of a run; the model cards are written too, which show them."""
    perplexities = dict(zip(perplexity, measured[: len(perplexity)], strict=True))
    by_task = dict(zip(scores, measured[len(perplexity) : -len(breakage)], strict=True))
    broken = dict(zip(breakage, measured[-len(breakage) :], strict=True))
    config_after = load_config(find_model(str(model)))
    after = build_structure(empty_model(config_after)).total_parameters
    written_windows = {"self": len(written["compensation"])} if written else {}
    chosen = job.prepared.vocabulary.summary if job.prepared.vocabulary else None
    before = chosen.parameters_before if chosen else plan.total_parameters
    numbers = [
        ModelNumbers(
            role=role,
            parameters=before if role == "dense" else after,
            perplexity=perplexities[role] or {},
            tasks=by_task.get(role) or {},
            breakage=broken.get(role),
            verdict=verdict_of(role, broken),
        )
        for role in TITLES
        if _is_evaluated(role, job.config)
    ]
    for each in numbers:
        perplexities_of = {f"perplexity {each.role}/{text}": one.perplexity for text, one in each.perplexity.items()}
        tell(job.prepared.callbacks, perplexities_of)
    result = RunResult(
        config=job.config,
        plan_hash=plan.hash,
        search=search,
        levelled=levelled,
        recovery=read_record(recovered) if recovered else None,
        models=tuple(numbers),
        windows={use: len(each) for use, each in usable(job, windows).items()} | written_windows,
        stages=job.prepared.reporter.finished_stages(),
        device=describe_device(job.prepared.device),
        vocabulary=chosen,
        foreign=None if chosen else _foreign_vocabulary(job, windows),
        target=target,
    )
    folders: dict[Role, Path | None] = {"searched": model, "recovered": recovered}
    for role, folder in folders.items():
        if folder:
            write_card(folder, model_card(job.prepared.location, config_after, plan, result, role))
    return result


def _foreign_vocabulary(job: Job, windows: Windows) -> ForeignVocabulary:
    """What of the vocabulary is written in scripts that the text has no letter of."""
    prepared, used = job.prepared, torch.cat([each.flatten() for each in windows.values()]).unique().tolist()
    config = prepared.empty.config
    scripts = foreign_tokens(prepared.tokenizer, config.vocab_size, used)
    embeddings = sum(tensor.numel() for tensor in prepared.empty.parameters() if config.vocab_size in tensor.shape[:1])
    share = embeddings / config.vocab_size * sum(scripts.values()) / prepared.structure.total_parameters
    return ForeignVocabulary(tokens=sum(scripts.values()), scripts=list(scripts)[:3], share=share)


@artifact("report.html", PAGE, inputs=(result,))
def report(job: Job, work: Path, result: RunResult) -> str:
    """The page that shows the run."""
    return render_report(job.prepared.folder, job.config)


# Every artifact stands behind its inputs.
ARTIFACTS: tuple[Artifact[Any], ...] = (
    *(vocabulary, windows, report_texts, report_texts_dense),
    *(self_written, moments, statistics, whole, search, levelled, plan, model),
    *(latencies, target, training_windows, recovered),
    *perplexity.values(),
    *scores.values(),
    continuations,
    *breakage.values(),
    *(result, report),
)


def usable(job: Job, windows: Windows) -> Windows:
    """The windows without those on which the loss of the dense model is not finite."""
    kept = dict(windows)
    for use, numbers in job.prepared.left_out(job.keys).items():
        mask = torch.ones(len(windows[use]), dtype=torch.bool)
        mask[numbers] = False
        kept[use] = windows[use][mask]
    return kept


def leave_out_broken_windows(job: Job, windows: Windows, error: NonFiniteError) -> None:
    """Finds and notes the windows on which the loss of the dense model is not finite.

    Args:
        error: the reason to look.

    Raises:
        NonFiniteError: the same, where no window is to blame.
        AdaPrunerError: the model is to blame, or too few windows are left.
    """
    fast, broken = in_fastest_dtype(job.prepared.dense), {}
    for use in windows:
        finite = torch.cat(list(losses_by_batch(fast, windows[use]))).isfinite()
        numbers = [int(number) for number in torch.nonzero(~finite).flatten()]
        at_least = {"pool": job.config.samples, "objective": 1, "compensation": 2}[use]
        if 2 * len(numbers) > len(finite) or len(finite) - len(numbers) < at_least:
            raise AdaPrunerError(
                f"the loss of the model is not finite on {len(numbers)} of the {len(finite)} windows of the {use}: its"
                " weights are broken or its dtype is too narrow: try `dtype` float32"
            ) from None
        if numbers:
            broken[use] = numbers
    if broken == job.prepared.left_out(job.keys):
        raise error
    for use, numbers in broken.items():
        job.prepared.reporter.note(
            f"left out, because the loss of the model on them is not finite: windows {numbers} of the {use}"
        )
    job.prepared.leave_out(job.keys, broken)
