"""The pruned model, how well it meets a target, and its recovery."""

from __future__ import annotations

import filecmp
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from adapruner.artifacts import Form, artifact
from adapruner.calibration import SELF_GENERATED, generate_windows
from adapruner.callbacks import tell
from adapruner.checkpoint import save_checkpoint
from adapruner.costs import Latencies, TargetOutcome, bytes_of_model, cache_bytes, dtype_in, is_gguf, timer
from adapruner.errors import AdaPrunerError, NonFiniteError
from adapruner.job import LATENCIES, Job
from adapruner.models import empty_model, find_model, load_config, load_model
from adapruner.planning import PruningPlan, Target
from adapruner.procedure._forms import TENSORS, Windows, json_form
from adapruner.procedure._search import BUDGET, compensation_of, plan
from adapruner.procedure._statistics import Moments, moments, text_to_fit
from adapruner.procedure._windows import self_written, vocabulary, windows
from adapruner.recovery import (
    DEFAULT_GENERATED_RECORDS,
    recover_into,
    scale_options,
    total_steps,
    train,
    window_examples,
)
from adapruner.result import shown_name
from adapruner.surgery import prune_model, refit_sequentially
from adapruner.tokens import Vocabulary

# What made it has written the folder already.
FOLDER: Form[Path] = Form(shutil.move, Path)
# In place of a folder that was not made there is an empty file.
FOLDER_OR_NONE: Form[Path | None] = Form(
    lambda made, path: shutil.move(made, path) if made else path.touch(),
    lambda path: path if path.is_dir() else None,
)


@artifact(
    "compensated",
    FOLDER_OR_NONE,
    inputs=(windows, self_written, moments, plan),
    options="compensation sequential",
    leaves="model family precision tuning_of_scales left_out",
    check=lambda job: job.prepared.fits_sequentially,
    is_wanted=lambda config: config.tunes_scales,
    is_result=False,
    version=2,
)
def compensated(
    job: Job, work: Path, windows: Windows, written: Windows | None, moments: Moments, plan: PruningPlan
) -> Path | None:
    """The pruned model before its scales are tuned, so that a kill does not cost the fit; None where they cannot be."""
    if not job.prepared.tunes_scales:
        return None
    return _save(job, work / "model", _compensated(job, windows, written, moments, plan), plan)


@artifact(
    "model",
    FOLDER,
    inputs=(windows, self_written, moments, plan, compensated),
    options="compensation sequential tune_scales",
    leaves="model family precision tuning_of_scales left_out",
    check=lambda job: (job.prepared.fits_sequentially, job.prepared.check_tuning()),
    is_shared=True,
    version=4,
)
def model(
    job: Job,
    work: Path,
    windows: Windows,
    written: Windows | None,
    moments: Moments,
    plan: PruningPlan,
    compensated: Path | None,
) -> Path:
    """The dense model, cut by the plan, compensated, its scales tuned by all processes together, and saved."""
    if compensated:
        pruned = _tuned(job, work / "tuning", compensated, text_to_fit(job, windows, written))
    elif job.prepared.process.leads:
        pruned = _compensated(job, windows, written, moments, plan)
    return _save(job, work / "model", pruned, plan) if job.prepared.process.leads else work / "model"


def _compensated(
    job: Job, windows: Windows, written: Windows | None, moments: Moments, plan: PruningPlan
) -> PreTrainedModel:
    """The dense model, cut by the plan and compensated."""
    prepared, compensation = job.prepared, compensation_of(job.config, moments)
    with prepared.reporter.stage("cutting"):
        pruned = prune_model(prepared.dense, prepared.structure, plan, compensation)
    if compensation and prepared.fits_sequentially:
        with prepared.reporter.stage("compensating", prepared.structure.layers) as advance:
            text = text_to_fit(job, windows, written)
            refit_sequentially(prepared.dense, pruned, prepared.structure, plan, compensation, text, advance)
    return pruned


def _tuned(job: Job, work: Path, compensated: Path, text: Tensor) -> PreTrainedModel:
    """A saved model with its scales tuned, if that brings it nearer to the dense model on windows that are held out.

    Args:
        text: [windows, tokens], int64.
    """
    prepared, given = job.prepared, partial(load_model, find_model(str(compensated)), "auto", str(job.prepared.device))
    settings = scale_options(job.config.seed, prepared.device, prepared.process.count)
    examples, pruned = window_examples(text, "the text of the compensation", settings), given()
    with prepared.reporter.stage("tuning scales", total_steps(examples, settings)) as advance:
        try:
            record = train(pruned, examples, settings, work, prepared.dense, advance)
        except NonFiniteError as error:
            prepared.reporter.note(f"The scales are left as they were: {error}")
            return given()
    if record.loss_after < record.loss_before:
        return pruned
    prepared.reporter.note(
        f"The scales are left as they were: tuning them brought the divergence from the dense model from"
        f" {record.loss_before:.4f} to {record.loss_after:.4f} nats per token"
    )
    return given()


def scales_were_tuned(compensated: Path | None, model: Path) -> bool:
    """Whether the scales of a saved model are others than before they were tuned: all other weights are the same."""
    return compensated is not None and not all(
        filecmp.cmp(file, model / file.name, shallow=False) for file in compensated.glob("*.safetensors")
    )


def _save(job: Job, folder: Path, pruned: PreTrainedModel, plan: PruningPlan) -> Path:
    with job.prepared.reporter.stage("saving"):
        origin = _origin(job, plan)
        # Another model is fine-tuned, or none yet.
        origin["texts"] = [text for text in origin["texts"] if text["use"] != "recovery"]
        save_checkpoint(pruned, job.prepared.tokenizer, folder, record=origin)
    return folder


def _origin(job: Job, plan: PruningPlan) -> dict[str, Any]:
    """What a checkpoint says of its making: the base model, and the texts that it was made with."""
    return {"base_model": shown_name(job.config.model), "texts": job.prepared.texts.as_records(), "plan": plan.hash}


@artifact(
    LATENCIES,
    json_form(Latencies),
    options="target_phase target_batch target_context head_granularity",
    leaves="model precision",
    is_wanted=lambda config: config.target_speed is not None,
)
def latencies(job: Job, work: Path) -> Latencies:
    """What layers take on this machine, by which the target was resolved."""
    return job.prepared.latencies


@artifact(
    "target.json",
    json_form(TargetOutcome),
    inputs=(latencies, plan, model),
    options=BUDGET,
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
    """Seconds of the saved model, for as many as were predicted for the dense one: both are measured alternately."""
    config, prepared = job.config, job.prepared
    models = {"dense": prepared.dense, "pruned": load_model(find_model(str(model)), "auto", config.device)}
    with prepared.reporter.stage("timing"):
        seconds = timer(config.target_phase, config.target_batch, config.tokens_of_target, is_reported=True)(models)
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
    pruned = load_model(find_model(str(model)), "auto", str(prepared.device))
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
