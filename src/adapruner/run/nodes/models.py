"""The pruned model and its recovery."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._blend import BlendPart, has_written_part
from adapruner.checkpoint._folder import read_origin, save_checkpoint
from adapruner.config import RecoveryOptions
from adapruner.errors import AdaPrunerError, NonFiniteError
from adapruner.files import copy_folder
from adapruner.graph.records import Form
from adapruner.measurement._moments import StoredMoments
from adapruner.memory import Placement
from adapruner.models._architecture import Architecture, check_tokens
from adapruner.models._loading import empty_model, load_model
from adapruner.models._places import ModelLocation, find_model
from adapruner.option_rules import is_on_after_least_squares
from adapruner.planning._plan import PruningPlan
from adapruner.progress import Reporter
from adapruner.recovery._adapters import check_adapters, scale_options
from adapruner.recovery._examples import Examples, Unwritten, read_examples, window_examples
from adapruner.recovery._folder import recover_into
from adapruner.recovery._predictions import write_predictions
from adapruner.recovery._trainers import check_device
from adapruner.recovery._training import total_steps, train
from adapruner.result import shown_name
from adapruner.run.nodes.declared import GRAPH, TENSORS, Windows
from adapruner.run.nodes.text import seed_of_writing
from adapruner.structure._blocks import Structure
from adapruner.surgery._cut import prune_model
from adapruner.surgery._sequential import refit_sequentially
from adapruner.texts import Texts

# What made it has written the folder already.
FOLDER: Form[Path] = Form(shutil.move, Path)

# Cutting and compensating


@GRAPH.in_memory
def fits_sequentially(sequential: bool | None, compensation: str, family: Architecture, empty: PreTrainedModel) -> bool:
    """True if the pruned model is fitted once more, layer by layer."""
    possible = family.has_plain_residual(empty.config)
    if sequential and not possible:
        raise AdaPrunerError(
            f"`sequential` is not possible for {family.model_type}, which scales or normalises the outputs of its"
            " blocks: leave it out, compensation is one-shot then"
        )
    return possible and is_on_after_least_squares(sequential, compensation)


@GRAPH.leaf(lambda possible: possible is True)
def possible_tuning(
    tune_scales: bool | None,
    compensation: str,
    placement: Placement,
    main_device: torch.device,
    empty: PreTrainedModel,
    seed: int,
) -> bool | AdaPrunerError:
    """True if the options or their defaults ask for tuned scales, and one device that can train holds all layers; what
    hinders it if that alone is missing."""
    if not is_on_after_least_squares(tune_scales, compensation):
        return False
    try:
        if len(placement.devices) > 1:
            raise AdaPrunerError("`tune_scales` needs all layers on one device: leave it out")
        check_device(main_device)
        check_adapters(empty_model(empty.config), scale_options(seed, main_device))
    except AdaPrunerError as error:
        return error
    return True


@GRAPH.in_memory
def tuning(possible_tuning: bool | AdaPrunerError, tune_scales: bool | None, reporter: Reporter) -> bool:
    """True if scales are tuned; that they cannot be is an error only if the options ask for it."""
    if isinstance(possible_tuning, bool):
        return possible_tuning
    if tune_scales:
        raise possible_tuning
    reporter.note(f"The scales of the pruned model will not be tuned: {possible_tuning}")
    return False


@GRAPH.leaf()
def origin(model: str, location: ModelLocation, texts: Texts) -> dict[str, Any]:
    """The record in a checkpoint of its base model and the texts that it was made with, or the base model was."""
    earlier = read_origin(location) or {"texts": []}
    return {"base_model": shown_name(model), "texts": earlier["texts"] + texts.as_records()}


def save_pruned(
    model: PreTrainedModel, tokenizer: Tokenizer, plan: PruningPlan, origin: dict[str, Any], folder: Path, tuned: bool
) -> None:
    """Writes the pruned model to a folder, with a record that says whether its scales are tuned."""
    # Another model is fine-tuned, or none yet.
    texts = [text for text in origin["texts"] if text.get("use") != "recovery"]
    record = origin | {"texts": texts, "plan": plan.hash, "tuned_scales": tuned}
    save_checkpoint(model, tokenizer, folder, record=record)


@GRAPH.kept("compensated", FOLDER, version=4, is_step=True)
def compensated(
    dense: PreTrainedModel,
    dense_fast_later: Callable[[], PreTrainedModel],
    structure: Structure,
    plan: PruningPlan,
    moments_to_correct: StoredMoments | None,
    text_to_fit: Tensor | None,
    fits_sequentially: bool,
    tokenizer: Tokenizer,
    origin: dict[str, Any],
    reporter: Reporter,
    work: Path,
) -> Path:
    """The dense model, cut by the plan and compensated, before its scales are tuned."""
    with reporter.stage("cutting"):
        pruned = prune_model(dense, structure, plan, moments_to_correct)
    if moments_to_correct is not None and fits_sequentially:
        assert text_to_fit is not None
        dense_fast = dense_fast_later()
        with reporter.stage("compensating", structure.layers) as advance:
            refit_sequentially(dense_fast, pruned, structure, plan, moments_to_correct, text_to_fit, advance)
    with reporter.stage("saving"):
        save_pruned(pruned, tokenizer, plan, origin, work / "model", tuned=False)
    return work / "model"


@GRAPH.kept("model", FOLDER, version=8, is_result=True)
def pruned(
    compensated: Path,
    tuning: bool,
    dense_fast_later: Callable[[], PreTrainedModel],
    plan: PruningPlan,
    tokenizer: Tokenizer,
    origin: dict[str, Any],
    text_to_fit: Tensor | None,
    main_device: torch.device,
    placement: Placement,
    ratio: float,
    seed: int,
    reporter: Reporter,
    work: Path,
) -> Path:
    """The compensated model, its scales tuned."""
    if tuning:
        assert text_to_fit is not None
        read = partial(load_model, find_model(str(compensated)), "auto", str(main_device), placement.layer_wise)
        settings = scale_options(seed, main_device, placement.layer_wise, text_to_fit.shape[1], ratio)
        model = _tuned(read, text_to_fit, dense_fast_later(), settings, reporter, work / "tuning")
        if model is not None:
            with reporter.stage("saving"):
                save_pruned(model, tokenizer, plan, origin, work / "model", tuned=True)
            return work / "model"
    copy_folder(compensated, work / "model")
    return work / "model"


def _tuned(
    load: Callable[[], PreTrainedModel],
    text: Tensor,
    teacher: PreTrainedModel,
    settings: RecoveryOptions,
    reporter: Reporter,
    work: Path,
) -> PreTrainedModel | None:
    """A saved model with its scales tuned; None if that brings it no nearer to the dense model on windows that are held
    out."""
    part = BlendPart("the text of the compensation", 1.0, None)
    blend = [window_examples(text, part, settings, label_weight=0.0)]
    with reporter.stage("tuning scales", total_steps(blend, settings)) as advance:
        try:
            tuned, record = train(load, blend, settings, work, teacher, advance)
        except NonFiniteError as error:
            why = str(error)
        else:
            if record.loss_after < record.loss_before:
                return tuned
            why = (
                f"tuning them brought the divergence from the dense model from {record.loss_before:.4f} to"
                f" {record.loss_after:.4f} nats per token"
            )
    reporter.note(f"The scales are left as they were: {why}")
    return None


@GRAPH.in_memory
def tuned_scales(pruned: Path) -> bool:
    """True if the scales of the saved model were tuned."""
    origin = read_origin(find_model(str(pruned)))
    return bool(origin and origin.get("tuned_scales"))


@GRAPH.costly
def pruned_model(pruned: Path, placement: Placement) -> PreTrainedModel:
    return load_model(find_model(str(pruned)), "auto", placement.device, placement.layer_wise)


# Recovery


@partial(GRAPH.costly, is_read_again_if="recover")
def examples(
    recovery_texts: tuple[BlendPart, ...],
    recovery: RecoveryOptions,
    tokenizer: Tokenizer,
    empty: PreTrainedModel,
    main_device: torch.device,
) -> list[Examples | Unwritten]:
    """The training examples of the pruned model, but for those that the dense model has yet to write. They are checked
    before the work begins, and read again when they are needed."""
    check_device(main_device)
    parts = read_examples(recovery_texts, tokenizer, recovery, recovery.label_weight)
    for part in parts:
        check_tokens(empty.config, part.largest_token)
    return parts


@GRAPH.kept("recovery.safetensors", TENSORS, version=4, is_wanted=lambda recover: recover and has_written_part(recover))
def training_texts(
    dense: PreTrainedModel,
    examples: list[Examples | Unwritten],
    tokenizer: Tokenizer,
    recovery: RecoveryOptions,
    seed: int,
    reporter: Reporter,
) -> Windows:
    """Text that the dense model writes for the pruned model to be fine-tuned on, by the name of its dataset."""
    written = {}
    for part in examples:
        if isinstance(part, Unwritten):
            with reporter.stage(f"writing {part.name}", part.count) as advance:
                seed_of_text = seed_of_writing("recovery", seed)
                written[part.name] = part.write(dense, tokenizer, recovery.seq_len, seed_of_text, advance)
    return written


@GRAPH.leaf()
def training_record(model: str, recover: str | None, recovery: RecoveryOptions) -> dict[str, Any]:
    """The record in a fine-tuned checkpoint of its training."""
    return {"model": model, "data": recover, **recovery.model_dump(mode="json")}


@GRAPH.kept("recovered", FOLDER, version=3, is_result=True, is_wanted=lambda recover: recover is not None)
def recovered(
    pruned: Path,
    plan: PruningPlan,
    dense_fast_later: Callable[[], PreTrainedModel],
    tokenizer: Tokenizer,
    examples: list[Examples | Unwritten],
    training_texts: Windows | None,
    recovery_texts: tuple[BlendPart, ...],
    recovery: RecoveryOptions,
    training_record: dict[str, Any],
    origin: dict[str, Any],
    main_device: torch.device,
    reporter: Reporter,
    work: Path,
) -> Path:
    """The saved model, fine-tuned on the text or on what the dense model predicts."""
    blend = [
        part if isinstance(part, Examples) else part.examples((training_texts or {})[part.name], recovery)
        for part in examples
    ]
    learns_predictions = recovery.label_weight < 1 or any(part.is_written for part in recovery_texts)
    teacher = dense_fast_later() if learns_predictions else None
    read = partial(load_model, find_model(str(pruned)), "auto", str(main_device))
    try:
        if teacher is not None and recovery.teacher_top:
            blend, teacher = write_predictions(teacher, blend, recovery, work / "training" / "teacher"), None
        with reporter.stage("recovering", total_steps(blend, recovery)) as advance:
            recover_into(
                work / "model",
                read,
                tokenizer,
                blend,
                recovery,
                teacher,
                training_record,
                work=work / "training",
                origin=origin | {"plan": plan.hash},
                progress=advance,
            )
    except AdaPrunerError as error:
        raise AdaPrunerError(
            f"{error}. The pruned model is complete: adapruner recover {pruned} trains it with other options"
        ) from None
    return work / "model"


@GRAPH.costly
def recovered_model(recovered: Path | None, placement: Placement) -> PreTrainedModel:
    return load_model(find_model(str(recovered)), "auto", placement.device, placement.layer_wise)
