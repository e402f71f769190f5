"""The pruned model: cut, compensated and healed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import copy_folder, write_text
from adapruner.base.progress import Reporter
from adapruner.budget.counts import Budget, kept_counts
from adapruner.budget.plan import PruningPlan
from adapruner.checkpoint import read_origin, save_checkpoint
from adapruner.graph.nodes import Form
from adapruner.measurement.moments import StoredMoments
from adapruner.model.loading import empty_model, load_model
from adapruner.model.places import ModelLocation, find_model
from adapruner.options import PruneConfig, RecoveryOptions
from adapruner.report.result import shown_name
from adapruner.run.choice import GRAPH as GRAPH
from adapruner.run.memory import Placement, healing_within
from adapruner.structure.blocks import Structure
from adapruner.surgery import prune_model
from adapruner.text.uses import Texts
from adapruner.text.windows import Text
from adapruner.train.healing import HEALING, Healing, heal, read_healing, steps_of_healing
from adapruner.train.trainer import check_adapters, check_device

# What made it has written the folder already.
FOLDER: Form[Path] = Form(shutil.move, Path)


@GRAPH.leaf(lambda options: options and options.model_dump_json())
def healing(
    config: PruneConfig,
    placement: Placement,
    main_device: torch.device,
    empty: PreTrainedModel,
    structure: Structure,
    starting_budget: Budget,
    reporter: Reporter,
) -> RecoveryOptions | None:
    """The options of the training after the cut; None without one."""
    left = structure.total_parameters - structure.removed_parameters(kept_counts(structure, starting_budget))
    options = healing_within(config, empty, left, placement.devices, placement.layer_wise)
    if config.heal == "none":
        return None
    try:
        if options is None:
            raise AdaPrunerError("its layers are spread over devices")
        check_device(main_device)
        if options.train != "layers":
            check_adapters(empty_model(empty.config), options)
    except AdaPrunerError as error:
        reporter.note(f"The pruned model will not be trained after the cut: {error}")
        return None
    return options


@GRAPH.leaf()
def origin(model: str, location: ModelLocation, texts: Texts) -> dict[str, Any]:
    """The record in a checkpoint of its base model and the texts that it was made with, or the base model was."""
    earlier = read_origin(location) or {"texts": []}
    return {"base_model": shown_name(model), "texts": earlier["texts"] + texts.as_records()}


@GRAPH.kept("model", FOLDER, version=11, is_result=True)
def pruned(
    dense_later: Callable[[], PreTrainedModel],
    dense_fast_later: Callable[[], PreTrainedModel],
    structure: Structure,
    plan: PruningPlan,
    moments_to_correct: StoredMoments | None,
    healing: RecoveryOptions | None,
    tokenizer: Tokenizer,
    origin: dict[str, Any],
    text_to_learn: tuple[Text, Text],
    main_device: torch.device,
    placement: Placement,
    reporter: Reporter,
    work: Path,
) -> Path:
    """The saved model: cut by the plan and compensated, then trained to predict as the dense model does, with the
    record of that; as it was compensated if training it brings it no nearer to the dense model on windows that are held
    out."""
    record, compensated, model = origin | {"plan": plan.hash}, work / "compensated", None
    if not compensated.exists():
        with reporter.stage("cutting"):
            cut = prune_model(dense_later(), structure, plan, moments_to_correct)
        with reporter.stage("saving"):
            save_checkpoint(cut, tokenizer, compensated, record=record)
        del cut
    outcome, (learnt, held_out) = None, text_to_learn
    if healing and not len(held_out):
        reporter.note("The weights are left as they were: no kind of text has three windows, one of which is held out")
    elif healing:
        read = partial(load_model, find_model(str(compensated)), "auto", str(main_device), placement.layer_wise)
        with reporter.stage("healing", steps_of_healing(healing)) as advance:
            model, outcome = heal(read, learnt, held_out, dense_fast_later(), healing, work / "training", advance)
        if model is None:
            reporter.note(f"The weights are left as they were: {outcome.reason}")
    if model is None:
        copy_folder(compensated, work / "model")
    else:
        with reporter.stage("saving"):
            save_checkpoint(model, tokenizer, work / "model", record=record)
    if outcome:
        write_text(work / "model" / HEALING, outcome.model_dump_json(indent=2) + "\n")
    return work / "model"


@GRAPH.in_memory
def healed(pruned: Path) -> Healing | None:
    """The record of the training; None without one."""
    return read_healing(pruned)


@GRAPH.costly
def pruned_model(pruned: Path, placement: Placement) -> PreTrainedModel:
    return load_model(find_model(str(pruned)), "auto", placement.device, placement.layer_wise)
