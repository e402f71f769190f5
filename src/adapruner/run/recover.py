"""Recovery of one pruned model."""

import contextlib
import gc
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import given_path, output_path, write_text
from adapruner.base.processes import end_with_parent, this_process
from adapruner.base.progress import Reporter
from adapruner.checkpoint import is_replaceable, read_origin, save_checkpoint
from adapruner.families import open_config, open_model
from adapruner.graph.folder import Folder
from adapruner.graph.making import Making
from adapruner.graph.nodes import Form, Graph
from adapruner.model.architecture import check_length, check_tokens
from adapruner.model.generation import check_prompts
from adapruner.model.loading import (
    empty_model,
    in_fastest_dtype,
    is_streamable,
    load_tokenizer,
    resolve_device,
    usable_devices,
)
from adapruner.model.places import ModelLocation, find_model
from adapruner.options import TRAINING_BUDGETS, Dtype, PruneOptions, RecoverConfig
from adapruner.recipes import read_recipe
from adapruner.report.card import card_of_recovered, read_card
from adapruner.run.folder import RunFolder
from adapruner.run.inputs import content_of_blend, content_of_model
from adapruner.run.memory import place_weights
from adapruner.run.options import register_extensions
from adapruner.text.blends import BlendPart, absolute_blend, parse_blend, record_of, sources_of
from adapruner.text.sources import Source
from adapruner.train.examples import Examples, Unwritten, read_examples
from adapruner.train.healing import read_healing
from adapruner.train.loss import write_predictions
from adapruner.train.trainer import check_adapters, check_device, check_processes, check_trainer_options, shard
from adapruner.train.training import RecoveryRecord, total_steps, train

# The record of the training, in the folder of a recovered model.
RECORD = "recovery.json"
# The options of a training that belong to its text, and not to the weights that are trained.
_OF_TEXT = {"label_weight", "seq_len"}


def recover(
    model: str | Path,
    data: str | None = None,
    output: str | Path | None = None,
    teacher: str | None = None,
    overwrite: bool = False,
    dtype: Dtype = "auto",
    device: str = "auto",
    recipe: str | Path | None = None,
    **options: Any,
) -> RecoveryRecord:
    """Fine-tunes a pruned model and writes it as a normal checkpoint with the record that is returned. A killed call
    resumes from its last saved step.

    Args:
        model: as for `load`; or the folder of a run, to continue its training. The teacher, the text, the number
            of tokens, the trained weights and, for these, the rate are then those of the run, unless given.
        data: instructions with answers, any text, `mix` (which the teacher writes), or `answers:DATASET`
            (the teacher answers these instructions); several with their shares, as `mix:0.3,c4:0.3,alpaca:0.4`.
        output: the folder of the recovered model; of a run, by default `recovered` in its folder.
        teacher: the dense model, for distillation.
        overwrite: start again if the folder holds another recovery.
        recipe: options to start from instead of those of the run, by the name of a shipped recipe or a YAML file; the
            other arguments override them.
        options: the fields of `RecoveryOptions`.

    Raises:
        AdaPrunerError: an option, the data, a model or the folder is invalid, before the weights are loaded; or the
            loss is not finite any more.
    """
    named = {"data": data, "teacher": teacher, "output": output, "dtype": None if dtype == "auto" else dtype}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None} | options
    if recipe:
        replaced = TRAINING_BUDGETS if given.keys() & {*TRAINING_BUDGETS} else ()
        given = {name: value for name, value in read_recipe(recipe).items() if name not in replaced} | given
    given["model"] = str(model)
    if RunFolder(given_path(model)).config.is_file():
        run = RunFolder(given_path(model))
        then, healing = run.read_config(), read_healing(run.model)
        register_extensions(then)
        of_run: dict[str, Any] = {"tokens": PruneOptions().heal if then.heal == "none" else then.heal}
        if given.keys() & {*TRAINING_BUDGETS}:
            of_run = {}
        if healing and healing.record:
            trains_the_same = given.get("train", healing.trained) == healing.trained
            names = healing.record.config.keys() - {*TRAINING_BUDGETS, "seed"} if trains_the_same else _OF_TEXT
            of_run |= {name: healing.record.config[name] for name in names - (_OF_TEXT if "data" in given else set())}
        text = absolute_blend(then.calibration, "calibration")
        of_run |= {"data": text, "teacher": then.model, "output": run.path / "recovered"}
        given = of_run | given | {"model": str(run.model)}
    if lacking := [name for name in ("data", "output") if name not in given]:
        raise AdaPrunerError(f"name `{lacking[0]}`: {model} is not the folder of a run")
    folder = RecoveryFolder(output_path(str(given.pop("output"))))
    config, process = RecoverConfig.from_options(**given), this_process()
    check_device(resolve_device(device))
    check_processes(config)
    check_trainer_options(config)
    if process.count > 1:
        end_with_parent()
    reporter = Reporter(quiet=not process.leads)
    making = Making(
        graph=RECOVERY,
        options=dict(config),
        as_json=config.model_dump(mode="json"),
        given={"config": config, "device": device, "reporter": reporter},
        folder=folder,
        reporter=reporter,
    )
    folder.check_apart([making.value(student), making.value(dense)], [source for _, source in making.value(sources)])
    folder.check_usable(overwrite)
    if not overwrite:
        making.refuse_outdated()
    missing = making.missing()
    making.prepare(missing)
    if missing and not process.leads:
        return making.take_part(recovered).record
    with folder.locked() if process.leads else contextlib.nullcontext():
        making.make_missing()
        return making.value(recovered).record


class RecoveryFolder(Folder):
    """The folder of a recovered model; records, work in progress and the lock are in a hidden folder beside it."""

    noun = "a recovery"

    def __init__(self, output: Path) -> None:
        super().__init__(output.parent, output.with_name(f".{output.name}.adapruner"), editable=("README.md",))
        self.shown = output

    def place(self, name: str) -> Path:
        return self.shown

    def check_apart(self, models: Iterable[ModelLocation | None], sources: Iterable[Source]) -> None:
        """Refuses a folder that is, or is around, something that is read."""
        paths = [given_path(location.path) for location in models if location]
        paths += [source.path or given_path(source.dataset) for source in sources]
        for path in (path.resolve() for path in paths):
            if path.exists() and self.shown.resolve() in (path, *path.parents):
                raise AdaPrunerError(f"{self.shown} is or contains {path}, which is read: choose another output")

    def check_usable(self, overwrite: bool) -> None:
        """Refuses a folder that holds something else; with `overwrite`, another one that this package wrote will do."""
        if not self.shown.exists():
            return
        is_ours = self.shown.is_dir() and is_replaceable(self.shown)
        if not (is_ours and (overwrite or self.record("model") or not any(self.shown.iterdir()))):
            hint = ", or `overwrite` to replace it" if is_ours else ""
            raise AdaPrunerError(f"{self.shown} exists and holds no such recovery: choose another output{hint}")


class Recovered(NamedTuple):
    """A recovered model and the record of its training."""

    folder: Path
    record: RecoveryRecord


RECOVERED: Form[Recovered] = Form(
    lambda made, path: shutil.move(made.folder, path), lambda path: Recovered(path, read_record(path))
)
RECOVERY = Graph(RecoverConfig, given=("device", "reporter"), unkeyed=("config",))


@RECOVERY.leaf(content_of_model, "model")
def student(model: str) -> ModelLocation:
    return find_model(model)


@RECOVERY.leaf(lambda location: location and content_of_model(location), "teacher")
def dense(teacher: str | None) -> ModelLocation | None:
    return find_model(teacher) if teacher else None


@RECOVERY.leaf(content_of_blend, "data")
def blend(data: str) -> tuple[BlendPart, ...]:
    return parse_blend(data)


@RECOVERY.leaf(lambda options: options.model_dump(mode="json", exclude={"model", "teacher", "data"}), "options")
def training(config: RecoverConfig, blend: tuple[BlendPart, ...]) -> RecoverConfig:
    """The options; refuses those under which nothing is learnt."""
    written = [part.name for part in blend if part.is_written]
    if written and config.teacher is None:
        raise AdaPrunerError(f"`data` {written[0]} is text that the dense model writes: name it with `teacher`")
    if config.teacher is not None and config.label_weight == 1 and not written:
        raise AdaPrunerError("with `label_weight` 1, nothing is learnt from a teacher: remove `teacher`, or lower it")
    return config


@RECOVERY.in_memory
def sources(blend: tuple[BlendPart, ...]) -> list[tuple[str, Source]]:
    return sources_of(blend)


@RECOVERY.in_memory
def tokenizer(student: ModelLocation) -> Tokenizer:
    return load_tokenizer(student)


@RECOVERY.in_memory
def parts(
    student: ModelLocation,
    dense: ModelLocation | None,
    blend: tuple[BlendPart, ...],
    tokenizer: Tokenizer,
    training: RecoverConfig,
    reporter: Reporter,
) -> list[Examples | Unwritten]:
    """The examples of each dataset; refuses models that cannot be trained on them, or learn from each other."""
    model_config = open_config(student)
    if training.train in ("lora", "ia3"):
        check_adapters(empty_model(model_config), training)
    warnings = [check_length(model_config, training.seq_len)]
    if dense:
        dense_config = open_config(dense)
        if (size := dense_config.vocab_size) != model_config.vocab_size:
            raise AdaPrunerError(f"the teacher has {size:,} tokens, the model {model_config.vocab_size:,}")
        _check_tokens_of_teacher(tokenizer, load_tokenizer(dense))
        warnings.append(check_length(dense_config, training.seq_len))
    examples = read_examples(blend, tokenizer, training, training.label_weight if dense else 1.0)
    for part in examples:
        check_tokens(model_config, part.largest_token)
        if isinstance(part, Unwritten) and dense:
            check_prompts(dense_config, part.prompts)
    reporter.note("\n".join(filter(None, dict.fromkeys(warnings))))
    return examples


@RECOVERY.leaf()
def shares_weights(device: str) -> bool:
    """True if the processes share the weights of models out by FSDP; on a CPU, accelerate ignores it."""
    return this_process().shares_weights and resolve_device(device).type != "cpu"


@RECOVERY.kept("model", RECOVERED, version=2, is_result=True)
def recovered(
    student: ModelLocation,
    dense: ModelLocation | None,
    sources: list[tuple[str, Source]],
    parts: list[Examples | Unwritten],
    tokenizer: Tokenizer,
    training: RecoverConfig,
    shares_weights: bool,
    device: str,
    reporter: Reporter,
    work: Path,
) -> Recovered:
    """The trained model, as a normal checkpoint with the record of its training."""
    load = partial(_load_teacher, dense, training, device, shares_weights) if dense else None
    examples, teacher = _taught(load, parts, tokenizer, training, work / "teacher", reporter)
    gc.collect()  # a teacher that is not needed is gone before the model is loaded
    read = partial(open_model, student, training.dtype, device, deferred=shares_weights)
    with reporter.stage("recovering", total_steps(examples, training)) as advance:
        model, record = train(read, examples, training, work / "training", teacher, advance)
    if this_process().leads:
        origin: dict[str, Any] = read_origin(student) or {"texts": []}
        origin |= {"texts": origin["texts"] + [{"use": "recovery"} | record_of(source) for _, source in sources]}
        save_checkpoint(model, tokenizer, work / "model", card_of_recovered(read_card(student), record), record=origin)
        write_text(work / "model" / RECORD, record.model_dump_json(indent=2) + "\n")
    return Recovered(work / "model", record)


RECOVERY.check()


def read_record(model: Path) -> RecoveryRecord:
    """The record of the training in the folder of a recovered model."""
    return RecoveryRecord.model_validate_json((model / RECORD).read_bytes())


def _check_tokens_of_teacher(tokenizer: Tokenizer, of_teacher: Tokenizer) -> None:
    """Refuses a teacher whose token ids stand for other text. Added tokens, such as chat tokens, may differ. Ids that
    only one tokenizer has are not compared."""
    texts, taught = ({number: text for text, number in own.get_vocab().items()} for own in (tokenizer, of_teacher))
    added = {*tokenizer.added_tokens_decoder, *of_teacher.added_tokens_decoder}
    compared = (texts.keys() & taught.keys()) - added or texts.keys()
    if other := sorted(number for number in compared if texts[number] != taught.get(number)):
        raise AdaPrunerError(
            f"`teacher`: {len(other):,} of {len(compared):,} tokens differ from the model's, such as {other[0]:,}:"
            f" {taught.get(other[0])!r:.50}, not {texts[other[0]]!r:.50}; choose a model with the same tokenizer"
        )


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


def _load_teacher(location: ModelLocation, config: RecoverConfig, device: str, shares: bool) -> PreTrainedModel:
    """The dense model: shared by all processes, or for `teacher_top` on several GPUs or layer by layer, or on the
    device of the training."""
    if shares:
        return shard(in_fastest_dtype(open_model(location, config.dtype, device, deferred=True)))
    if not config.teacher_top:
        return open_model(location, config.dtype, device)
    dense_config = open_config(location)
    may_stream = is_streamable(location, dense_config)
    places = place_weights([empty_model(dense_config)], config.dtype, usable_devices(device), 1, may_stream)
    return open_model(location, config.dtype, places.device, places.layer_wise)
