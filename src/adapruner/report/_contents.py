"""The content of the folder of a finished run, for the report."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from adapruner.calibration._text import load_texts_by_use
from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError, first_problem
from adapruner.evaluation._speed import Speed
from adapruner.graph.folder import RunFolder
from adapruner.models._loading import load_tokenizer
from adapruner.models._places import find_model
from adapruner.result import RunResult

T = TypeVar("T")


def read_result(run: RunFolder) -> RunResult:
    """The result of a finished run.

    Raises:
        AdaPrunerError: the folder holds no run, or one that is not finished; or the result cannot be read.
    """
    config, path = run.read_config(), run.path / "result.json"
    if not path.is_file() or not _is_current(run, path.name, config):
        raise AdaPrunerError(f"the run in {run.path} is not finished: rerun its command to resume")
    return _read_json(path, RunResult)


def _is_current(run: RunFolder, name: str, config: PruneConfig) -> bool:
    """True if an artifact and its inputs were made with these options, and none of them is being rebuilt."""
    record = run.record(name)
    if record is None:
        return False
    # A search that was taken from another run removes what that removed.
    is_taken = name == "search.json" and config.searched is not None
    made_with = config.model_copy(update={"ratio": config.searched}) if is_taken else config
    # An input without a record decides nothing.
    inputs = [(input_, key, then.key) for input_, key in record.inputs.items() if (then := run.record(input_))]
    return record.has_options_of(made_with) and all(
        key == now and _is_current(run, input_, config) for input_, key, now in inputs
    )


def read_speed(run: RunFolder, result: RunResult) -> tuple[Speed, Speed] | None:
    """The speed of the dense and the final model, if `adapruner benchmark --output` wrote it here. They are identified
    by their numbers of parameters: the speed of an earlier pruned model is not shown."""
    measured = _read_json(run.speed, dict[str, Speed]) if run.speed.is_file() else {}
    by_size = {speed.parameters: speed for speed in measured.values()}
    dense, final = (by_size.get(model.parameters) for model in (result.model("dense"), result.final))
    return (dense, final) if dense and final else None


def read_samples(run: RunFolder, numbers: tuple[int, ...]) -> dict[int, str | None]:
    """The texts of calibration samples by their numbers in the pool, read with the tokenizer of the saved model; None
    if the windows or the model were removed."""
    windows, model = run.path / "windows.safetensors", run.path / "model"
    if not windows.exists() or not model.exists():
        return dict.fromkeys(numbers)
    pool, tokenizer = load_texts_by_use(windows)["pool"], load_tokenizer(find_model(str(model)))
    return {number: str(tokenizer.decode(pool.windows[number].tolist())) for number in numbers}


def _read_json(path: Path, of: type[T]) -> T:
    """The content of a JSON file; refuses one of another version of this package, or one that was changed."""
    try:
        return TypeAdapter(of).validate_json(path.read_bytes())
    except ValidationError as error:
        raise AdaPrunerError(
            f"{path} is of another version of adapruner, or was changed ({first_problem(error)}): rerun the command of"
            " the run, or use the version that wrote it"
        ) from None
