"""Recovery of one pruned model."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._blend import parse_blend, sources_of
from adapruner.calibration._reading import content_hash
from adapruner.card import card_of_recovered, read_card
from adapruner.checkpoint._folder import read_origin
from adapruner.config import TRAINING_BUDGETS, Dtype, PruneOptions, RecoverConfig
from adapruner.errors import AdaPrunerError
from adapruner.families import open_config, open_model
from adapruner.graph.folder import RunFolder
from adapruner.memory import place_weights
from adapruner.models._architecture import check_length, check_tokens
from adapruner.models._device import in_fastest_dtype, resolve_device, usable_devices
from adapruner.models._loading import empty_model, is_streamable, load_tokenizer
from adapruner.models._places import ModelLocation, find_model, fingerprint
from adapruner.paths import given_path, output_path
from adapruner.processes import end_with_parent, this_process
from adapruner.progress import Reporter
from adapruner.recovery._adapters import check_adapters
from adapruner.recovery._examples import Examples, Unwritten, read_examples
from adapruner.recovery._folder import begin_training, check_folder, recover_into, training_alone, working_folder
from adapruner.recovery._healing import read_healing
from adapruner.recovery._predictions import write_predictions
from adapruner.recovery._sharding import shard
from adapruner.recovery._trainers import check_device, check_processes, check_trainer_options
from adapruner.recovery._training import RecoveryRecord, total_steps
from adapruner.texts import record_of


def recover(
    model: str | Path,
    data: str | None = None,
    output: str | Path | None = None,
    teacher: str | None = None,
    overwrite: bool = False,
    dtype: Dtype = "auto",
    device: str = "auto",
    **options: Any,
) -> RecoveryRecord:
    """Fine-tunes a pruned model and writes it as a normal checkpoint with the record that is returned. A killed call
    resumes from its last saved step.

    Args:
        model: as for `load`; or the folder of a run, to continue its training. The teacher, the text, the trained
            weights and the number of tokens are then those of the run, unless others are given.
        data: instructions with answers, any text, `mix` (which the teacher writes), or `answers:DATASET`
            (the teacher answers these instructions); several with their shares, as `mix:0.3,c4:0.3,alpaca:0.4`.
        output: the folder of the recovered model; of a run, by default `recovered` in its folder.
        teacher: the dense model, for distillation.
        overwrite: start again if the folder holds another recovery.
        options: the fields of `RecoveryOptions`.

    Raises:
        AdaPrunerError: an option, the data, a model or the folder is invalid, before the weights are loaded; or the
            loss is not finite any more.
    """
    given = {"data": data, "teacher": teacher, "output": output}
    given = {"model": str(model)} | {name: value for name, value in given.items() if value is not None} | options
    if RunFolder(given_path(model)).config.is_file():
        of_run = _of_run(RunFolder(given_path(model)))
        if given.keys() & {*TRAINING_BUDGETS}:
            del of_run["tokens"]
        given = of_run | given | {"model": str(given_path(model) / "model")}
    if missing := [name for name in ("data", "output") if name not in given]:
        raise AdaPrunerError(f"name `{missing[0]}`: {model} is not the folder of a run")
    folder = output_path(str(given.pop("output")))
    config = RecoverConfig.from_options(dtype=dtype, **given)
    teacher, blend = config.teacher, parse_blend(config.data)
    paths = [given_path(name) for name in (config.model, teacher) if name]
    sources = [source for _, source in sources_of(blend)]
    paths += [source.path or given_path(source.dataset) for source in sources]
    for path in (path.resolve() for path in paths):
        if path.exists() and folder.resolve() in (path, *path.parents):
            raise AdaPrunerError(f"{folder} is or contains {path}, which is read: choose another output")
    written = [part.name for part in blend if part.is_written]
    if written and teacher is None:
        raise AdaPrunerError(f"`data` {written[0]} is text that the dense model writes: name it with `teacher`")
    if teacher is not None and config.label_weight == 1 and not written:
        raise AdaPrunerError("with `label_weight` 1, nothing is learnt from a teacher: remove `teacher`, or lower it")
    check_device(resolve_device(device))
    check_processes(config)
    check_trainer_options(config)
    student, dense = find_model(config.model), find_model(teacher) if teacher else None
    open_config(student)  # the commit of a Hub model is known then
    # Another model or text may have the same name in a later call.
    content = [*map(fingerprint, filter(None, (student, dense))), *map(content_hash, sources)]
    resolved = config.model_dump(mode="json") | {"content": content}
    if this_process().count > 1:
        end_with_parent()
    with training_alone(folder):
        if finished := check_folder(folder, resolved, overwrite):
            return finished
        # On a CPU, accelerate ignores FSDP.
        shares = this_process().shares_weights and resolve_device(device).type != "cpu"
        warnings = _check_models(config, student, dense)
        tokenizer = load_tokenizer(student)
        parts = read_examples(blend, tokenizer, config, config.label_weight if dense else 1.0)
        for part in parts:
            check_tokens(open_config(student), part.largest_token)
        begin_training(folder, resolved, overwrite)
        Reporter().note(warnings)
        reporter = Reporter(quiet=not this_process().leads)
        load = partial(_load_teacher, dense, config, device, shares) if dense else None
        examples, loaded_teacher = _taught(load, parts, tokenizer, config, working_folder(folder) / "teacher", reporter)
        gc.collect()  # a teacher that is not needed is gone before the model is loaded
        origin: dict[str, Any] = read_origin(student) or {"texts": []}
        texts = origin["texts"] + [{"use": "recovery"} | record_of(source) for source in sources]
        with reporter.stage("recovering", total_steps(examples, config)) as advance:
            return recover_into(
                folder,
                partial(open_model, student, config.dtype, device, deferred=shares),
                tokenizer,
                examples,
                config,
                loaded_teacher,
                resolved,
                working_folder(folder),
                origin | {"texts": texts},
                partial(card_of_recovered, read_card(student)),
                advance,
            )


def _of_run(run: RunFolder) -> dict[str, Any]:
    """The options that continue the training of a run."""
    config, healing = run.read_config(), read_healing(run.model)
    options: dict[str, Any] = {"tokens": PruneOptions().heal if config.heal == "none" else config.heal}
    if healing and healing.record:
        of_healing = healing.record.config.items()
        options |= {name: value for name, value in of_healing if name not in (*TRAINING_BUDGETS, "seed")}
    return options | {"data": config.calibration, "teacher": config.model, "output": run.path / "recovered"}


def _taught(
    load_teacher: Callable[[], PreTrainedModel] | None,
    parts: list[Examples | Unwritten],
    tokenizer: Tokenizer,
    config: RecoverConfig,
    predictions: Path,
    reporter: Reporter,
) -> tuple[list[Examples], PreTrainedModel | None]:
    """The examples, with those that the teacher writes, and the teacher; None without one, or if what it predicts was
    written to the folder of its predictions."""
    if load_teacher is None:
        return cast(list[Examples], parts), None  # parts that a teacher writes are refused without one
    with reporter.stage("loading"):
        dense = load_teacher()
    examples = []
    for part in parts:
        if isinstance(part, Unwritten):
            with reporter.stage(f"writing {part.name}", part.count) as advance:
                written = part.write(dense, tokenizer, config.seq_len, config.seed, advance)
            part = part.examples(written, config)
        examples.append(part)
    teacher = in_fastest_dtype(dense)
    del dense  # if the teacher is a copy, the original weights are not needed
    if not config.teacher_top:
        return examples, teacher
    count = sum(len(part.training) + len(part.validation) for part in examples)
    with reporter.stage("asking the teacher", count) as advance:
        return write_predictions(teacher, examples, config, predictions, advance), None


def _check_models(config: RecoverConfig, location: ModelLocation, dense_location: ModelLocation | None) -> str:
    """Refuses models that cannot be trained, or learn from each other; returns warnings."""
    model_config = open_config(location)
    if config.train in ("lora", "ia3"):
        check_adapters(empty_model(model_config), config)
    warnings = [check_length(model_config, config.seq_len)]
    if dense_location:
        dense_config = open_config(dense_location)
        if dense_config.vocab_size != model_config.vocab_size:
            raise AdaPrunerError(
                f"the teacher has a vocabulary of {dense_config.vocab_size:,} tokens, the model one of"
                f" {model_config.vocab_size:,}"
            )
        warnings.append(check_length(dense_config, config.seq_len))
    return "\n".join(filter(None, dict.fromkeys(warnings)))


def _load_teacher(location: ModelLocation, config: RecoverConfig, device: str, shares: bool) -> PreTrainedModel:
    """The dense model: shared by all processes, or for `teacher_top` on several GPUs or layer by layer, or on the
    device of the training."""
    if shares:
        return shard(in_fastest_dtype(open_model(location, config.dtype, device, deferred=True)))
    if not config.teacher_top:
        return open_model(location, config.dtype, device)
    dense_config = open_config(location)
    may_stream = is_streamable(location, dense_config)
    places = place_weights(empty_model(dense_config), config.dtype, usable_devices(device), 1, may_stream)
    return open_model(location, config.dtype, places.device, places.layer_wise)
