"""Recovery from a model to a model folder, which goes on after a kill."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.checkpoint import save_checkpoint
from adapruner.config import RecoveryOptions
from adapruner.errors import AdaPrunerError, reason
from adapruner.files import saying_what_cannot_be_written, write_atomically
from adapruner.processes import this_process
from adapruner.recovery._examples import Examples
from adapruner.recovery._training import Recovered, train

RECORD = "recovery.json"
_CONFIG = "config.json"
_RECORD_FIELDS = {field.name for field in fields(Recovered)}


def recover_into(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    examples: Examples,
    options: RecoveryOptions,
    teacher: PreTrainedModel | None,
    config: dict[str, Any],
    card: Callable[[dict[str, Any]], str | None] = lambda record: None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trains a model and writes it, a normal checkpoint again, with a record of the training beside it.

    Until it is whole, everything is in a folder beside it, `FOLDER.training`, from where the same call goes on.

    Args:
        teacher: for distillation; None learns the labels.
        config: which model on which data, and all options.
        card: makes the model card out of the record.

    Returns:
        The record: what `recovery.json` in the folder holds.
    """
    work = working_folder(folder)
    recovered = train(model, examples, options, work, teacher, progress)
    record = {
        "config": config,
        "method": "labels" if teacher is None else "distillation",
        "training_examples": len(examples.training),
        "validation_examples": len(examples.validation),
        "skipped_records": examples.skipped,
        **asdict(recovered),
    }
    if not this_process().leads:
        return record
    save_checkpoint(model, tokenizer, folder, card(record))
    write_atomically(folder / RECORD, lambda partial: partial.write_text(json.dumps(record, indent=2) + "\n"))
    shutil.rmtree(work, ignore_errors=True)
    return record


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished recovery; None where there is none.

    Raises:
        AdaPrunerError: it is broken.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    record = _read(path)
    if not isinstance(record.get("config"), dict) or not record.keys() >= _RECORD_FIELDS:
        raise AdaPrunerError(f"{path} is not the record of a recovery: choose another output, or --overwrite")
    return record


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdaPrunerError(f"cannot read {path}: {reason(error)}; choose another output, or --overwrite") from None
    return content if isinstance(content, dict) else {}


def check_folder(folder: Path, config: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Makes sure, before anything is done, that a recovery may write to a folder and go on from what is beside it.

    Args:
        config: all that the result depends on, as JSON.
        overwrite: what is there may go.

    Returns:
        The record, if it is finished already.

    Raises:
        AdaPrunerError: the folder holds another recovery, or something else.
    """
    if overwrite and (folder / RECORD).is_file():
        return None
    record, earlier = read_record(folder), _earlier_config(folder)
    # Without a record it may be ours still: a kill may have come between the model and its record.
    ours = record is not None or (earlier is not None and (folder / "config.json").is_file())
    if not ours and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdaPrunerError(f"{folder} exists and holds no recovery: choose another output")
    if overwrite:
        return None
    if earlier is not None and earlier != config:
        names = dict.fromkeys([*earlier, *config])
        changed = [f"{n} {earlier.get(n)!r} → {config.get(n)!r}" for n in names if earlier.get(n) != config.get(n)]
        raise AdaPrunerError(
            f"{folder} holds a recovery of another config ({', '.join(changed)}): choose another output, or"
            " --overwrite to start it again"
        )
    return record


@contextlib.contextmanager
def training_alone(folder: Path) -> Iterator[None]:
    """Keeps other commands from training into the same folder meanwhile; processes started together count as one.

    Raises:
        AdaPrunerError: another one does, or the place cannot be written.
    """
    if not this_process().leads:
        yield
        return
    path = folder.with_name(f"{folder.name}.training.lock")
    lock = FileLock(path, timeout=0)
    with saying_what_cannot_be_written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise AdaPrunerError(
                f"another command is training into {folder}: wait for it, or choose another output"
            ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def start_folder(folder: Path, config: dict[str, Any], overwrite: bool) -> None:
    """Makes the folder to work in; to overwrite, removes what is there.

    Raises:
        AdaPrunerError: it cannot be written.
    """
    work = working_folder(folder)
    if not this_process().leads:
        return
    try:
        if overwrite:
            for old in (folder, work):
                shutil.rmtree(old, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdaPrunerError(f"cannot write to {folder}: {error.strerror}") from None
    write_atomically(work / _CONFIG, lambda partial: partial.write_text(json.dumps(config)))


def _earlier_config(folder: Path) -> dict[str, Any] | None:
    record, started = read_record(folder), working_folder(folder) / _CONFIG
    if record is None and not started.is_file():
        return None
    config: dict[str, Any] = record["config"] if record else _read(started)
    return config


def working_folder(folder: Path) -> Path:
    """Where a recovery into a folder leaves what it goes on from."""
    return folder.with_name(f"{folder.name}.training")
