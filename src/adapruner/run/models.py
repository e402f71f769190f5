"""The pruned model, cut, compensated and healed; the numbers of both models, the result and the page."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import copy_folder, write_text
from adapruner.base.progress import Reporter, StageCost
from adapruner.budget.counts import Budget, kept_counts
from adapruner.budget.plan import PruningPlan
from adapruner.checkpoint import read_origin, save_checkpoint, write_card, write_model
from adapruner.copying import copied_bytes, copies_without_experts, fields_without_experts
from adapruner.evaluation.abilities import (
    Abilities,
    answer_counts,
    at_chance,
    estimates,
    judge,
    measure_abilities,
    windows_of,
    write_answers,
)
from adapruner.evaluation.losses import Perplexity, Spelling, measure_perplexity
from adapruner.evaluation.tasks import Tasks, TaskScore, load_tasks, measure_tasks
from adapruner.graph.nodes import Form
from adapruner.measurement.moments import StoredMoments
from adapruner.model.config import load_config
from adapruner.model.loading import describe_device, empty_model, holds_codes, in_fastest_dtype, load_model
from adapruner.model.places import ModelLocation, find_model
from adapruner.options import PruneConfig, RecoveryOptions
from adapruner.report.card import model_card
from adapruner.report.result import ModelNumbers, RunResult, shown_name
from adapruner.run.choice import GRAPH as GRAPH
from adapruner.run.folder import RunFolder, page_of
from adapruner.run.inputs import MOST_READ, TENSORS, Precision, json_form
from adapruner.run.memory import Placement, bytes_in_files, dtype_of_weights, healing_within, keeps_codes
from adapruner.search.judging import Costs
from adapruner.search.study import SearchResult
from adapruner.structure.blocks import Structure
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from adapruner.text.blends import Texts, record_of
from adapruner.text.sources import Source
from adapruner.text.windows import EvaluationText, Text, start_of_windows
from adapruner.tokens.model import FewerTokens, cut_vocabulary
from adapruner.tokens.tokenizer import spelling_of, tokens_of_both
from adapruner.train.healing import HEALING, Healing, heal, read_healing, reading_at_most, steps_of_healing
from adapruner.train.trainer import check_adapters, check_device

# What made it has written the folder already.
FOLDER: Form[Path] = Form(shutil.move, Path)


@GRAPH.leaf(lambda options: options and options.model_dump_json())
def healing(
    config: PruneConfig,
    location: ModelLocation,
    placement: Placement,
    main_device: torch.device,
    empty: PreTrainedModel,
    structure: Structure,
    starting_budget: Budget,
    reporter: Reporter,
) -> RecoveryOptions | None:
    """The options of the training after the cut; None without one."""
    counts = kept_counts(structure, starting_budget)
    if location.is_local:
        copied_bytes(location, empty.config, structure, counts)  # refuses what cannot be copied
    left = structure.total_parameters - structure.removed_parameters(counts)
    options = healing_within(config, empty, left, placement.devices, placement.layer_wise)
    if options is None:
        return None
    if keeps_codes(config, location, empty, structure, counts):
        reporter.note(
            "The pruned model is not trained after the cut: its weights are copied in FP8 or MXFP4, and training would"
            " write all of them in 16 bits, which need more memory. `heal` with a number of tokens does so"
        )
        return None
    check_device(main_device)
    try:
        if options.train != "layers":
            check_adapters(empty_model(empty.config), options)
    except AdaPrunerError as error:
        reporter.note(f"The pruned model will not be trained after the cut: {error}")
        return None
    return options


@GRAPH.leaf()
def origin(
    model: str, location: ModelLocation, texts: Texts, vocabulary_texts: tuple[Source, ...]
) -> dict[str, object]:
    """The record in a checkpoint of its base model and the texts that it was made with, or the base model was."""
    earlier = read_origin(location) or {"texts": []}
    counted = [{"use": "vocabulary"} | record_of(source) for source in vocabulary_texts]
    return {"base_model": shown_name(model), "texts": earlier["texts"] + counted + texts.as_records()}


@GRAPH.kept("model", FOLDER, version=17, is_result=True)
def pruned(
    location: ModelLocation,
    empty: PreTrainedModel,
    precision: Precision,
    dense_later: Callable[[], PreTrainedModel],
    dense_fast_later: Callable[[], PreTrainedModel],
    structure: Structure,
    plan: PruningPlan,
    moments_to_correct: StoredMoments | None,
    healing: RecoveryOptions | None,
    tokenizer: Tokenizer,
    tokens_left: FewerTokens | None,
    tokenizer_left: Tokenizer,
    origin: dict[str, object],
    text_to_learn: tuple[Text, Text],
    more_to_learn: dict[str, Text] | None,
    placement: Placement,
    reporter: Reporter,
    work: Path,
) -> Path:
    """The saved model: cut by the plan and compensated, or without its experts copied from the files; then trained to
    predict as the dense model does, with the record of that; as it was compensated if training it brings it no nearer
    to the dense model on windows that are held out. Tokens are removed last, so that both models read the same ones
    until then."""
    record, compensated, model = origin | {"plan": plan.hash}, work / "compensated", None
    if not compensated.exists():
        cut, write = dense_later(), None
        if precision.weights == dtype_of_weights(empty, "auto"):
            write = copies_without_experts(location, empty.config, structure, plan)
        if holds_codes(location) and (write is None or healing or tokens_left):
            dtype = str(precision.weights).removeprefix("torch.")
            reporter.note(f"The original's weights are in FP8 or MXFP4; those of the pruned model are in {dtype}")
        elif write is None and fields_without_experts(structure, [len(block.kept) for block in plan.blocks]):
            reporter.note("Kept experts cannot be copied out of the files of the original: the model is cut in memory")
        if write is None:
            with reporter.stage("cutting"):
                cut = prune_model(cut, structure, plan, moments_to_correct)
        with reporter.stage("saving"):
            save_checkpoint(cut, tokenizer, compensated, record=record, write=write or write_model)
        del cut
    outcome, (learnt, held_out) = None, text_to_learn
    if healing and not len(held_out):
        reporter.note("The weights are left as they were: no kind of text has three windows, one of which is held out")
    elif healing:
        read = partial(load_model, find_model(compensated), "auto", placement.device, placement.layer_wise)
        learnt = Text.joined([learnt, *(more_to_learn or {}).values()])
        healing, note = reading_at_most(MOST_READ, learnt, healing)
        reporter.note(note)
        with reporter.stage("healing", steps_of_healing(healing)) as advance:
            start, training = start_of_windows(tokenizer, healing.seq_len), work / "training"
            model, outcome = heal(read, learnt, held_out, dense_fast_later(), healing, training, advance, start)
        if model is None:
            reporter.note(f"The weights are left as they were: {outcome.reason}")
    if tokens_left:
        model = model or load_model(find_model(compensated), "auto", placement.device, placement.layer_wise)
        cut_vocabulary(model, tokens_left.vocabulary)
    if model is None:
        copy_folder(compensated, work / "model")
    else:
        with reporter.stage("saving"):
            save_checkpoint(model, tokenizer_left, work / "model", record=record)
    if outcome:
        write_text(work / "model" / HEALING, outcome.model_dump_json(indent=2) + "\n")
    return work / "model"


@GRAPH.in_memory
def healed(pruned: Path) -> Healing | None:
    """The record of the training; None without one."""
    return read_healing(pruned)


@GRAPH.costly
def pruned_model(pruned: Path, placement: Placement) -> PreTrainedModel:
    return load_model(find_model(pruned), "auto", placement.device, placement.layer_wise)


PAGE: Form[str] = Form(
    lambda page, path: path.write_text(page, encoding="utf-8"), lambda path: path.read_text(encoding="utf-8")
)


@GRAPH.costly
def pruned_fast(pruned_model: PreTrainedModel) -> PreTrainedModel:
    return in_fastest_dtype(pruned_model)


@GRAPH.in_memory
def spelling(tokenizer: Tokenizer, tokenizer_left: Tokenizer) -> Spelling | None:
    """How the pruned model spells tokens that it does not have; None if it has all."""
    return spelling_of(tokenizer, tokenizer_left)


@GRAPH.in_memory
def no_spelling() -> None:
    """That of the dense model, which has all tokens."""


@GRAPH.in_memory
def counted(tokenizer: Tokenizer, tokenizer_left: Tokenizer) -> frozenset[int]:
    """The tokens by which abilities are compared."""
    return tokens_of_both(tokenizer, tokenizer_left)


def measured_perplexity(
    model: PreTrainedModel, texts: dict[str, EvaluationText], spelling: Spelling | None, reporter: Reporter
) -> dict[str, Perplexity]:
    """The perplexity of a model on every text of the report, by name."""
    with reporter.stage("evaluating", sum(len(text.windows) for text in texts.values())) as advance:
        return {
            name: measure_perplexity(model, text.windows, name, advance, **text.about, spelling=spelling)
            for name, text in texts.items()
        }


@GRAPH.kept("evaluation/answers.safetensors", TENSORS, version=2)
def answers(dense_fast: PreTrainedModel, tokenizer: Tokenizer, reporter: Reporter) -> dict[str, torch.Tensor]:
    """What the dense model writes for both models to read, and predicts in it."""
    with reporter.stage("writing answers", sum(answer_counts().values())) as advance:
        return write_answers(dense_fast, tokenizer, advance)


@GRAPH.kept("evaluation/chance.json", json_form(dict[str, str]))
def chance(dense_fast: PreTrainedModel, tokenizer: Tokenizer, reporter: Reporter) -> dict[str, str]:
    """The abilities that the dense model shows no more than by chance."""
    with reporter.stage("solving built-in tasks"):
        return at_chance(dense_fast, tokenizer)


def measured_abilities(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    answers: dict[str, torch.Tensor],
    spelling: Spelling | None,
    counted: frozenset[int],
    reporter: Reporter,
) -> Abilities:
    """What a model can do."""
    with reporter.stage("comparing abilities", sum(map(len, windows_of(answers).values()))) as advance:
        return measure_abilities(model, tokenizer, answers, None, spelling, counted, advance)


@GRAPH.leaf()
def used_documents(texts: Texts) -> Callable[[], list[str]]:
    return texts.used_documents


@GRAPH.in_memory
def loaded_tasks(
    tasks: tuple[str, ...],
    limit: int | None,
    used_documents: Callable[[], list[str]],
    calibration_texts: object,
    objective_texts: object,
) -> Tasks:
    """Tasks of lm-eval, without the items whose text the model is calibrated or trained on."""
    # The documents are read when they are needed: the texts put their content into the key.
    return load_tasks(tasks, limit, used_documents())


def measured_tasks(
    model: PreTrainedModel, tokenizer: Tokenizer, loaded_tasks: Tasks, reporter: Reporter
) -> dict[str, TaskScore]:
    """The scores of a model in every task, by name."""
    with reporter.stage("running tasks", len(loaded_tasks)) as advance:
        scores = measure_tasks(model, tokenizer, loaded_tasks, advance)
        return {score.task: score for score in scores}


# By role, the model in its own dtype, in which perplexity is measured, and in that of trials for all else; its tokens.
for _role, _model, _fast, _tokenizer, _spelling in (
    ("dense", "dense", "dense_fast", "tokenizer", "no_spelling"),
    ("pruned", "pruned_model", "pruned_fast", "tokenizer_left", "spelling"),
):
    GRAPH.kept(
        f"evaluation/perplexity-{_role}.json",
        json_form(dict[str, Perplexity]),
        name=f"perplexity_{_role}",
        needs={"model": _model, "texts": "report_texts", "spelling": _spelling},
        version=4,
    )(measured_perplexity)
    GRAPH.kept(
        f"evaluation/tasks-{_role}.json",
        json_form(dict[str, TaskScore]),
        name=f"tasks_{_role}",
        needs={"model": _fast, "tokenizer": _tokenizer},
        version=2,
        is_wanted=lambda tasks: tasks,
    )(measured_tasks)
    GRAPH.kept(
        f"evaluation/abilities-{_role}.json",
        json_form(Abilities),
        name=f"abilities_{_role}",
        needs={"model": _fast, "tokenizer": _tokenizer, "spelling": _spelling},
        version=3,
    )(measured_abilities)


@GRAPH.kept(
    "result.json", json_form(RunResult), version=10, is_result=True, is_record=True, beside=("model/README.md",)
)
def result(
    config: PruneConfig,
    location: ModelLocation,
    empty: PreTrainedModel,
    precision: Precision,
    windows: dict[str, Text],
    costs: Costs | None,
    counts_by_cost: list[int] | None,
    search_result: SearchResult | None,
    plan: PruningPlan,
    share_of_decoder: float,
    pruned: Path,
    healed: Healing | None,
    perplexity_dense: dict[str, Perplexity],
    perplexity_pruned: dict[str, Perplexity],
    tasks_dense: dict[str, TaskScore] | None,
    tasks_pruned: dict[str, TaskScore] | None,
    abilities_dense: Abilities,
    abilities_pruned: Abilities,
    chance: dict[str, str],
    main_device: torch.device,
    tokens_left: FewerTokens | None,
    structure: Structure,
    stage_costs: Callable[[], dict[str, StageCost]],
) -> RunResult:
    """All numbers of a run; the model card is written too, which shows them."""
    config_after = load_config(find_model(pruned))
    after = build_structure(empty_model(config_after)).total_parameters
    counts = [len(block.kept) for block in plan.blocks]
    before_bytes, after_bytes = bytes_in_files(config, location, empty, structure, counts)
    of_tokens = tokens_left.summary.removed_parameters * precision.weights.itemsize if tokens_left else 0
    left = estimates(abilities_dense, abilities_pruned, chance)
    dense = ModelNumbers(
        role="dense",
        parameters=plan.total_parameters,
        perplexity=perplexity_dense,
        tasks=tasks_dense or {},
        abilities=abilities_dense,
    )
    final = ModelNumbers(
        role="pruned",
        parameters=after,
        perplexity=perplexity_pruned,
        tasks=tasks_pruned or {},
        abilities=abilities_pruned,
        left=left,
        verdict=judge(left),
    )
    result = RunResult(
        config=config,
        plan_hash=plan.hash,
        share_of_decoder=share_of_decoder,
        removed_bytes=before_bytes - after_bytes + of_tokens,
        costs=costs if counts_by_cost else None,
        search=search_result,
        healing=healed,
        vocabulary=tokens_left.summary if tokens_left else None,
        embedding_share=structure.parts["embedding"] / structure.total_parameters,
        models=(dense, final),
        windows={use: {kind: len(own) for kind, own in text.by_kind.items()} for use, text in windows.items()},
        stages=stage_costs(),
        device=describe_device(main_device),
    )
    write_card(pruned, model_card(location, config_after, plan, result))
    return result


@GRAPH.kept("report.html", PAGE, is_result=True, names_folder=True)
def report(result: RunResult, plan: PruningPlan, run_folder: RunFolder) -> str:
    """The page that shows the run."""
    return page_of(run_folder, result, plan)


GRAPH.check()
