"""Recovery from a model to a model folder, which resumes after a kill."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.checkpoint._folder import save_checkpoint
from adapruner.config import RecoveryOptions
from adapruner.errors import AdaPrunerError, reason
from adapruner.files import saying_what_cannot_be_written, write_text
from adapruner.processes import this_process
from adapruner.recovery._examples import Examples
from adapruner.recovery._training import RecoveryRecord, train

RECORD = "recovery.json"
_CONFIG = "config.json"


def recover_into(
    folder: Path,
    load: Callable[[], PreTrainedModel],
    tokenizer: Tokenizer,
    blend: Sequence[Examples],
    options: RecoveryOptions,
    teacher: PreTrainedModel | None,
    config: dict[str, Any],
    work: Path,
    origin: dict[str, Any] | None = None,
    card: Callable[[RecoveryRecord], str | None] = lambda record: None,
    progress: Callable[[int], None] | None = None,
) -> RecoveryRecord:
    """Trains a model (see `train`) and writes it as a normal checkpoint, with the record of the training.

    Args:
        config: of the record: the model, the data and all options.
        work: folder for the state from which the same call resumes; removed at the end.
        origin: the record of the checkpoint; see `save_checkpoint`.
        card: makes the model card from the record.
    """
    model, record = train(load, blend, options, work, teacher, progress)
    record = record.model_copy(update={"config": config})
    if this_process().leads:
        save_checkpoint(model, tokenizer, folder, card(record), record=origin)
        write_text(folder / RECORD, record.model_dump_json(indent=2) + "\n")
        shutil.rmtree(work, ignore_errors=True)
    return record


def read_record(folder: Path) -> RecoveryRecord | None:
    """The record of a finished recovery; None if there is none. Refuses a broken one."""
    path = folder / RECORD
    try:
        return RecoveryRecord.model_validate_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValidationError) as error:
        cause = "it has other fields" if isinstance(error, ValidationError) else reason(error)
        raise AdaPrunerError(
            f"{path} is not the record of a recovery ({cause}): choose another output, or `overwrite`"
        ) from None


def check_folder(folder: Path, config: dict[str, Any], overwrite: bool) -> RecoveryRecord | None:
    """The record of the recovery if it is finished already. Refuses a folder that holds another recovery, which may be
    replaced with `overwrite` and is kept until the new one is finished, or something else.

    Args:
        config: everything that the result depends on, as JSON.
    """
    if overwrite and (folder / RECORD).is_file():
        return None
    record, started = read_record(folder), working_folder(folder) / _CONFIG
    begun: dict[str, Any] | None = None
    if started.is_file():
        try:
            content = json.loads(started.read_text(encoding="utf-8"))
            begun = content if isinstance(content, dict) else {}
        except (OSError, ValueError, RecursionError) as error:
            raise AdaPrunerError(
                f"cannot read {started}: {reason(error)}; choose another output, or `overwrite`"
            ) from None
    # A kill between the model and its record leaves a folder without a record.
    ours = record is not None or (begun is not None and (folder / "config.json").is_file())
    if not ours and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdaPrunerError(f"{folder} exists and holds no recovery: choose another output")
    if overwrite:
        return None
    # A finished recovery whose weights were deleted is repeated.
    if record and record.config == config and any(folder.glob("*.safetensors")):
        return record
    # A recovery that has begun replaces a finished one.
    earlier = begun or (record.config if record else config)
    if earlier != config:
        names = [name for name in dict.fromkeys([*earlier, *config]) if earlier.get(name) != config.get(name)]
        changed = ", ".join(f"{name} {earlier.get(name)!r} → {config.get(name)!r}" for name in names)
        raise AdaPrunerError(
            f"{folder} holds a recovery of another config ({changed}): choose another output, or `overwrite` to start"
            " it again"
        )
    return None


@contextlib.contextmanager
def training_alone(folder: Path) -> Iterator[None]:
    """Keeps other commands from training into the same folder. Processes that were started together count as one."""
    if not this_process().leads:
        yield
        return
    lock = FileLock(folder.with_name(f"{folder.name}.training.lock"), timeout=0)
    with saying_what_cannot_be_written(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise AdaPrunerError(
                f"another command is training into {folder}: wait for it, or choose another output"
            ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open; filelock does it there
            Path(lock.lock_file).unlink()
        lock.release()


def begin_training(folder: Path, config: dict[str, Any], overwrite: bool) -> None:
    """Makes the working folder, which records what is trained. With `overwrite`, an earlier one is removed."""
    if this_process().leads:
        work = working_folder(folder)
        if overwrite:
            shutil.rmtree(work, ignore_errors=True)
        write_text(work / _CONFIG, json.dumps(config))


def working_folder(folder: Path) -> Path:
    """The folder next to the output in which `adapruner recover` keeps its state to resume from."""
    return folder.with_name(f"{folder.name}.training")
