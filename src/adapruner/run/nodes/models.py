"""The pruned model: cut, compensated and healed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._text import Text
from adapruner.checkpoint._folder import read_origin, save_checkpoint
from adapruner.config import PruneConfig, RecoveryOptions
from adapruner.errors import AdaPrunerError
from adapruner.files import copy_folder, write_text
from adapruner.graph.records import Form
from adapruner.measurement._moments import StoredMoments
from adapruner.memory import Placement, healing_within
from adapruner.models._loading import empty_model, load_model
from adapruner.models._places import ModelLocation, find_model
from adapruner.planning._budget import Budget, kept_counts
from adapruner.planning._plan import PruningPlan
from adapruner.progress import Reporter
from adapruner.recovery._adapters import check_adapters
from adapruner.recovery._healing import HEALING, Healing, heal, read_healing, steps_of_healing
from adapruner.recovery._trainers import check_device
from adapruner.result import shown_name
from adapruner.run.nodes.declared import GRAPH
from adapruner.structure._blocks import Structure
from adapruner.surgery._cut import prune_model
from adapruner.texts import Texts

# What made it has written the folder already.
FOLDER: Form[Path] = Form(shutil.move, Path)

# Cutting and compensating


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


@GRAPH.kept("compensated", FOLDER, version=6, is_step=True)
def compensated(
    dense: PreTrainedModel,
    structure: Structure,
    plan: PruningPlan,
    moments_to_correct: StoredMoments | None,
    tokenizer: Tokenizer,
    origin: dict[str, Any],
    reporter: Reporter,
    work: Path,
) -> Path:
    """The dense model, cut by the plan and compensated, before it is healed."""
    with reporter.stage("cutting"):
        pruned = prune_model(dense, structure, plan, moments_to_correct)
    with reporter.stage("saving"):
        save_checkpoint(pruned, tokenizer, work / "model", record=origin | {"plan": plan.hash})
    return work / "model"


@GRAPH.kept("model", FOLDER, version=10, is_result=True)
def pruned(
    compensated: Path,
    healing: RecoveryOptions | None,
    dense_fast_later: Callable[[], PreTrainedModel],
    plan: PruningPlan,
    tokenizer: Tokenizer,
    origin: dict[str, Any],
    text_to_learn: tuple[Text, Text],
    main_device: torch.device,
    placement: Placement,
    reporter: Reporter,
    work: Path,
) -> Path:
    """The saved model, trained to predict as the dense model does, with the record of that; as it was compensated if
    training it brings it no nearer to the dense model on windows that are held out."""
    model, record = None, None
    learnt, held_out = text_to_learn
    if healing and not len(held_out):
        reporter.note("The weights are left as they were: no kind of text has three windows, one of which is held out")
    elif healing:
        read = partial(load_model, find_model(str(compensated)), "auto", str(main_device), placement.layer_wise)
        with reporter.stage("healing", steps_of_healing(healing)) as advance:
            model, record = heal(read, learnt, held_out, dense_fast_later(), healing, work / "training", advance)
        if model is None:
            reporter.note(f"The weights are left as they were: {record.reason}")
    if model is None:
        copy_folder(compensated, work / "model")
    else:
        with reporter.stage("saving"):
            save_checkpoint(model, tokenizer, work / "model", record=origin | {"plan": plan.hash})
    if record:
        write_text(work / "model" / HEALING, record.model_dump_json(indent=2) + "\n")
    return work / "model"


@GRAPH.in_memory
def healed(pruned: Path) -> Healing | None:
    """The record of the training; None without one."""
    return read_healing(pruned)


@GRAPH.costly
def pruned_model(pruned: Path, placement: Placement) -> PreTrainedModel:
    return load_model(find_model(str(pruned)), "auto", placement.device, placement.layer_wise)
