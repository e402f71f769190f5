"""Recovery of one pruned model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from adapruner.calibration import SELF_GENERATED, Source, content_hash, generate_windows, parse_source
from adapruner.card import card_of_recovered, read_card
from adapruner.checkpoint import check_push, push, read_origin
from adapruner.config import Dtype, RecoverConfig, Tracker
from adapruner.errors import AdaPrunerError
from adapruner.families import open_config, open_model
from adapruner.models import (
    ModelLocation,
    check_length,
    check_tokens,
    empty_model,
    find_model,
    fingerprint,
    in_fastest_dtype,
    load_tokenizer,
    resolve_device,
)
from adapruner.paths import given_path, output_path
from adapruner.processes import this_process
from adapruner.progress import Reporter
from adapruner.recovery import (
    DEFAULT_GENERATED_RECORDS,
    RecoveryRecord,
    begin_training,
    check_adapters,
    check_batch_size,
    check_device,
    check_folder,
    read_examples,
    recover_into,
    total_steps,
    training_alone,
    window_examples,
    working_folder,
)
from adapruner.texts import record_of
from adapruner.tracking import Tracking, check_tracker


def recover(
    model: str | Path,
    data: str,
    output: str | Path,
    teacher: str | None = None,
    overwrite: bool = False,
    dtype: Dtype = "auto",
    device: str = "auto",
    track: Tracker | None = None,
    push_to_hub: str | None = None,
    hub_private: bool = True,
    hub_revision: str | None = None,
    hub_token: str | None = None,
    **options: Any,
) -> RecoveryRecord:
    """Fine-tunes a pruned model and writes it as a normal checkpoint with a record, which is returned. A killed call
    resumes from its last saved step.

    Args:
        model: as for `load`.
        data: instructions with answers, any text, or `self`: text that the teacher writes.
        output: the folder of the recovered model.
        teacher: the dense model, for distillation.
        overwrite: start again if the folder holds another recovery.
        track: experiment tracker that gets the training curves; TensorBoard's files are in OUTPUT.tracking.
        push_to_hub: upload the recovered model to this repository.
        hub_private: create a new repository as a private one.
        hub_revision: branch to upload to, by default the main one.
        hub_token: by default the token of `hf auth login`.
        options: the fields of `RecoveryOptions`.

    Raises:
        AdaPrunerError: an option, the data, a model or the folder is invalid, before the weights are loaded; or the
            loss is not finite any more.
    """
    config = RecoverConfig.from_options(model=str(model), data=data, teacher=teacher, dtype=dtype, **options)
    if push_to_hub:
        check_push(push_to_hub, hub_token)
    folder = output_path(output)
    for read in (given_path(name).resolve() for name in (config.model, teacher, data) if name):
        if read.exists() and folder.resolve() in (read, *read.parents):
            raise AdaPrunerError(f"{folder} is or holds what this reads from, {read}: choose another output")
    source = None if data == SELF_GENERATED else parse_source(data)
    if source is None and teacher is None:
        raise AdaPrunerError("`data` self is text that the dense model writes: name it with `teacher`")
    check_device(resolve_device(device))
    check_batch_size(config.batch_size)
    check_tracker(track)
    location, teacher_location = find_model(config.model), find_model(teacher) if teacher else None
    open_config(location)  # the commit of a Hub model is known then
    # Another model of the same name, or another text, must not pass for those of an earlier call.
    models = [location, teacher_location] if teacher_location else [location]
    content = [fingerprint(model_read) for model_read in models] + [source and content_hash(source)]
    resolved = config.model_dump(mode="json") | {"content": content}
    with training_alone(folder):
        record = check_folder(folder, resolved, overwrite) or _train(
            folder, config, resolved, overwrite, location, teacher_location, source, device, track
        )
    if push_to_hub and this_process().leads:
        push(folder, push_to_hub, hub_private, hub_revision, hub_token)
    return record


def _train(
    folder: Path,
    config: RecoverConfig,
    resolved: dict[str, Any],
    overwrite: bool,
    location: ModelLocation,
    teacher_location: ModelLocation | None,
    source: Source | None,
    device: str,
    track: Tracker | None,
) -> RecoveryRecord:
    """Reads the data, loads the models and trains; without a source, on text that the teacher writes."""
    model_config, leads = open_config(location), this_process().leads
    if config.train != "full":
        check_adapters(empty_model(model_config), config)
    warnings = [check_length(model_config, config.seq_len)]
    if teacher_location:
        dense_config = open_config(teacher_location)
        if dense_config.vocab_size != model_config.vocab_size:
            raise AdaPrunerError(
                f"the teacher has a vocabulary of {dense_config.vocab_size:,} tokens, the model one of"
                f" {model_config.vocab_size:,}"
            )
        warnings.append(check_length(dense_config, config.seq_len))
    tokenizer = load_tokenizer(location)
    examples = read_examples(source, tokenizer, config) if source else None
    if examples:
        check_tokens(model_config, examples.largest_token)
    begin_training(folder, resolved, overwrite)
    Reporter().note("\n".join(filter(None, dict.fromkeys(warnings))))
    with Tracking(track if leads else None, folder.with_name(f"{folder.name}.tracking"), Reporter().note) as tracking:
        reporter = Reporter(quiet=not leads, watchers=(tracking,))
        dense = None
        if teacher_location:
            with reporter.stage("loading"):
                dense = open_model(teacher_location, config.dtype, device)
        if examples is None:
            assert dense is not None
            with reporter.stage("writing text"):
                count = config.records or DEFAULT_GENERATED_RECORDS
                windows = generate_windows(dense, count, config.seq_len, config.seed)
            examples = window_examples(windows, SELF_GENERATED, config)
        teacher = None
        if dense is not None and not config.learns_labels(examples.instructions, has_teacher=True):
            teacher = in_fastest_dtype(dense)
        del dense  # its weights are not needed next to a copy
        with reporter.stage("recovering", total_steps(examples, config)) as advance:
            return recover_into(
                folder,
                partial(open_model, location, config.dtype, device),
                tokenizer,
                examples,
                config,
                teacher,
                resolved,
                working_folder(folder),
                _origin(location, source),
                partial(card_of_recovered, read_card(location)),
                advance,
                tracking.on_numbers,
            )


def _origin(location: ModelLocation, source: Source | None) -> dict[str, Any]:
    """The record of origin of the model, with the text that it was trained on."""
    origin: dict[str, Any] = read_origin(location) or {"texts": []}
    return origin | {"texts": origin["texts"] + ([{"use": "recovery"} | record_of(source)] if source else [])}
