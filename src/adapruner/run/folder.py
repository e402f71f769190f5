"""The folder of a run: its files, its options, and what a finished one holds."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError, first_problem, reason
from adapruner.base.files import atomic_path, write_atomically
from adapruner.base.tables import Table
from adapruner.budget.plan import PruningPlan
from adapruner.evaluation.speed import Speed
from adapruner.families import open_model
from adapruner.graph.folder import Folder
from adapruner.model.loading import load_tokenizer
from adapruner.model.places import find_model
from adapruner.options import PruneConfig
from adapruner.report.page import render_report
from adapruner.report.result import RunResult, advice_on, shown_name, summary_of, tables_of
from adapruner.text.windows import load_texts_by_use

# The model card is for people to edit; the report is written again by its own command.
_EDITABLE = ("README.md", "report.html")


class RunFolder(Folder):
    """A folder with the artifacts of a run."""

    noun = "a run"

    def __init__(self, path: Path) -> None:
        super().__init__(path, editable=_EDITABLE)
        self.config = path / "config.yaml"
        self.log = path / "log.jsonl"
        self.study = path / "study.jsonl"
        self.model = path / "model"
        self.report = path / "report.html"
        self.speed = path / "speed.json"
        # A model and text that were in memory.
        self.given = path / "given"

    @classmethod
    def temporary(cls) -> RunFolder:
        """A folder that is removed with the object."""
        run = cls(Path(tempfile.mkdtemp(prefix="adapruner-")))
        weakref.finalize(run, shutil.rmtree, run.path, ignore_errors=True)
        return run

    def read_config(self) -> PruneConfig:
        """The options of the run."""
        if not self.config.is_file():
            raise AdaPrunerError(f"{self.path} holds no run: name the folder that adapruner prune wrote")
        return PruneConfig.load(self.config)

    def save_config(self, config: PruneConfig) -> None:
        write_atomically(self.config, config.save)

    def check_usable(self) -> None:
        """Refuses a folder that holds something else, or cannot be written."""
        # A command that was killed at its start leaves these, and perhaps an unfinished config.
        left = (self._lock.name, self._running.name, self.given.name, f"{self.config.name}.partial")
        try:
            if self.path.exists() and not (
                self.path.is_dir() and (self.config.is_file() or all(path.name in left for path in self.path.iterdir()))
            ):
                raise AdaPrunerError(f"{self.path} exists and holds no run: choose another `output`")
            existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        except OSError as error:
            raise AdaPrunerError(f"cannot write to {self.path}: {reason(error)}") from None
        if self.config.is_file():
            self.read_config()
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise AdaPrunerError(f"cannot write to {self.path}: {existing} is not a writable directory")

    def remove_given_but(self, config: PruneConfig) -> None:
        """Removes models and texts of earlier calls that the config does not name."""
        names = str(list(config.model_dump().values()))
        for path in self.given.iterdir() if self.given.is_dir() else ():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


T = TypeVar("T")


@dataclass(frozen=True)
class PruneResult:
    """A finished run.

    Attributes:
        output: the folder with its artifacts.
        plan: which groups are kept.
        result: the content of `result.json`.
    """

    output: Path
    plan: PruningPlan
    result: RunResult
    # A temporary run folder exists as long as this.
    _run: RunFolder | None = field(default=None, repr=False, compare=False)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The pruned model; loaded when it is first used, and kept."""
        return open_model(find_model(str(self.model_folder)))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return load_tokenizer(find_model(str(self.model_folder)))

    @property
    def model_folder(self) -> Path:
        """The pruned checkpoint; `adapruner.load` reads it."""
        return self.output / "model"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.output / "report.html"

    def advice(self) -> list[str]:
        """Problems of the outcome and remedies, a line each."""
        return advice_on(self.result)

    def tables(self) -> list[Table]:
        """Parameters and perplexities of all models, abilities, and scores in tasks, if they were measured;
        rich prints them."""
        return tables_of(self._title, self.result.models)

    def summary(self) -> Table:
        """What was removed and lost, in a few rows, which the command line prints."""
        return summary_of(self._title, self.result.models)

    @property
    def _title(self) -> str:
        return f"{shown_name(self.result.config.model)}: {self.result.removed_share:.1%} of all parameters removed"


def read_result(run: RunFolder) -> RunResult:
    """The result of a finished run."""
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
    made_with = config.model_dump(mode="json") | ({"ratio": config.searched} if is_taken else {})
    # An input without a record decides nothing.
    inputs = [(input_, key, then.key) for input_, key in record.inputs.items() if (then := run.record(input_))]
    options = {name: value for name, value in record.options.items() if name in made_with}  # that there still are
    return options.items() <= made_with.items() and all(
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
    pool, tokenizer = load_texts_by_use(windows)["pool"], load_tokenizer(find_model(model))
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


def page_of(run: RunFolder, result: RunResult, plan: PruningPlan) -> str:
    """The page of a finished run, as text."""
    try:
        samples = read_samples(run, result.search.best.samples) if result.search else {}
        return render_report(run.path, result, plan, samples, read_speed(run, result))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise AdaPrunerError(f"cannot read the run in {run.path}: {reason(error)}") from error


def write_report(run: RunFolder) -> Path:
    """Writes `report.html` of a finished run."""
    page = page_of(run, read_result(run), PruningPlan.load(run.path / "plan.json"))
    # The run itself may be writing the page too.
    with atomic_path(run.report, ".other") as partial:
        partial.write_text(page, encoding="utf-8")
    return run.report
