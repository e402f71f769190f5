"""The content of a run folder for the report, finished or not."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError, first_problem, reason
from adapruner.evaluation import Breakage, Perplexity, Speed, TaskScore
from adapruner.graph import Record, RunFolder
from adapruner.models import find_model, load_tokenizer
from adapruner.planning import PruningPlan
from adapruner.progress import Reporter, StageCost
from adapruner.result import ModelNumbers, Role, RunResult, roles_of, verdict_of
from adapruner.search import History, Levelled, SearchResult, StudyFile

T = TypeVar("T")


@dataclass(frozen=True)
class Contents:
    """The content of a run folder, finished or not.

    Attributes:
        path: the folder with its artifacts.
        state: `running` while a command is running in it.
        stage: the current stage of a running command.
        config: the options.
        history: the trials so far.
        plan: which groups are kept; None before the search has ended, as are `search` and `levelled`.
        result: None before the run is finished.
        models: with the numbers that were measured so far.
        samples: the texts of the chosen calibration samples, by their numbers in the pool; None before the model is
            saved, which has the tokenizer.
        stages: seconds and peak memory of every finished stage.
        weight_bytes: size of the weights of the final model on disk.
        speed: of the dense and the final model, if `adapruner benchmark --output` wrote it here.
    """

    path: Path
    state: Literal["finished", "running", "stopped"]
    stage: str | None
    config: PruneConfig
    history: History
    plan: PruningPlan | None
    search: SearchResult | None
    levelled: Levelled | None
    result: RunResult | None
    models: tuple[ModelNumbers, ...]
    samples: dict[int, str | None]
    stages: dict[str, StageCost]
    weight_bytes: int
    speed: tuple[Speed, Speed] | None

    @property
    def dense(self) -> ModelNumbers | None:
        return self.models[0] if self.models else None

    @property
    def final(self) -> ModelNumbers | None:
        """The last model so far; None before anything is pruned."""
        return self.models[-1] if len(self.models) > 1 else None

    @property
    def final_folder(self) -> Path:
        """The folder of its checkpoint."""
        return self.path / ("recovered" if self.final and self.final.role == "recovered" else "model")


def read_contents(run: RunFolder, config: PruneConfig) -> Contents:
    """Reads the content of a run folder.

    Args:
        config: the options of the run.

    Raises:
        AdaPrunerError: something in the folder cannot be read.
    """
    made = _Artifacts(run, config)
    try:
        return _read(made)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise AdaPrunerError(f"cannot read the run in {run.path}: {reason(error)}") from error


@dataclass(frozen=True)
class _Artifacts:
    """The artifacts of a run that agree with its options and with each other; others are left from earlier options. The
    model and the texts that they were made from are not checked."""

    run: RunFolder
    config: PruneConfig
    _records: dict[str, Record | None] = field(default_factory=dict)

    def record(self, name: str) -> Record | None:
        """The record of an artifact that was made, or is being made, with these options, as were its inputs."""
        if name not in self._records:
            record = self.run.record(name)
            self._records[name] = record if record and self._is_current(record) else None
        return self._records[name]

    @property
    def keys(self) -> set[str]:
        """The keys of all artifacts that are made or being made."""
        return {record.key for record in map(self.record, self.run.recorded) if record}

    def path(self, name: str) -> Path | None:
        """The path of an artifact that is finished, and was not removed."""
        record = self.record(name)
        if record is None or record.files is None:
            return None
        path = self.run.path / name
        return path if path.exists() else None

    def read(self, name: str, of: type[T]) -> T | None:
        """The content of a JSON file; None if it is not finished."""
        path = self.path(name)
        return _read_json(path, of) if path else None

    def _is_current(self, record: Record) -> bool:
        # A search that was taken from another run removes what that removed.
        is_taken = record.name == "search.json" and self.config.searched is not None
        config = self.config.model_copy(update={"ratio": self.config.searched}) if is_taken else self.config
        # An input without a record decides nothing.
        inputs = [name for name in record.inputs if self.run.record(name)]
        records = {name: self.record(name) for name in inputs}
        return record.has_options_of(config) and all(
            record.inputs[name] == (made.key if made else None) for name, made in records.items()
        )


def _read(made: _Artifacts) -> Contents:
    run, config = made.run, made.config
    plan_path, model_path = made.path("plan.json"), made.path("recovered") or made.path("model")
    plan = PruningPlan.load(plan_path) if plan_path else None
    search, result = made.read("search.json", SearchResult), made.read("result.json", RunResult)
    search_record = made.record("search.json")
    history = search or (History.of(StudyFile(run.study, search_record.key).finished()) if search_record else History())
    levelled = made.read("levelled.json", Levelled) if config.levels_widths else None
    is_running = result is None and run.is_running()
    models = result.models if result else tuple(_models(made, plan))
    return Contents(
        path=run.path,
        state="finished" if result else "running" if is_running else "stopped",
        stage=_current_stage(run.log) if is_running else None,
        config=config,
        history=history,
        plan=plan,
        search=search,
        levelled=result.levelled if result else levelled,
        result=result,
        models=models,
        samples=_samples(made, search.best.samples) if search else {},
        stages=result.stages if result else Reporter(run.log).finished_stages(made.keys),
        weight_bytes=sum(file.stat().st_size for file in model_path.glob("*.safetensors")) if model_path else 0,
        speed=_speed(run, models),
    )


def _models(made: _Artifacts, plan: PruningPlan | None) -> list[ModelNumbers]:
    """The models that were saved or measured so far."""
    if plan is None:
        return []
    models = []
    breakage: dict[Role, Breakage | None] = {}
    saved = {"dense": True, "searched": made.path("model"), "recovered": made.path("recovered")}
    for role in roles_of(made.config):
        perplexity = made.read(f"evaluation/perplexity-{role}.json", dict[str, Perplexity]) or {}
        tasks = made.read(f"evaluation/tasks-{role}.json", dict[str, TaskScore]) or {}
        breakage[role] = made.read(f"evaluation/breakage-{role}.json", Breakage)
        if perplexity or tasks or saved.get(role):
            removed = 0 if role == "dense" else plan.removed_parameters
            models.append(
                ModelNumbers(
                    role=role,
                    parameters=plan.total_parameters - removed,
                    perplexity=perplexity,
                    tasks=tasks,
                    breakage=breakage[role],
                    verdict=verdict_of(role, breakage),
                )
            )
    return models


def _speed(run: RunFolder, models: tuple[ModelNumbers, ...]) -> tuple[Speed, Speed] | None:
    """The speed of the dense and the final model, which are identified by their numbers of parameters: the speed of an
    earlier pruned model is not shown."""
    measured = _read_json(run.speed, dict[str, Speed]) if run.speed.is_file() else {}
    by_size = {speed.parameters: speed for speed in measured.values()}
    pair = [by_size.get(model.parameters) for model in (models[0], models[-1])] if len(models) > 1 else []
    dense, final = pair or (None, None)
    return (dense, final) if dense and final else None


def _samples(made: _Artifacts, numbers: tuple[int, ...]) -> dict[int, str | None]:
    """The texts of samples by their numbers, read with the tokenizer of the saved model."""
    windows, model = made.path("windows.safetensors"), made.path("model")
    if not windows or not model:
        return dict.fromkeys(numbers)
    pool, tokenizer = load_file(windows)["pool"], load_tokenizer(find_model(str(model)))
    return {number: str(tokenizer.decode(pool[number].tolist())) for number in numbers}


def _read_json(path: Path, of: type[T]) -> T:
    """The content of a JSON file.

    Raises:
        AdaPrunerError: it is of another version of this package, or was changed.
    """
    try:
        return TypeAdapter(of).validate_json(path.read_bytes())
    except ValidationError as error:
        raise AdaPrunerError(
            f"{path} is of another version of adapruner, or was changed ({first_problem(error)}): rerun the command of"
            " the run, or use the version that wrote it"
        ) from None


def _current_stage(log: Path) -> str | None:
    """The stage that has begun and not ended."""
    stage = None
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        with contextlib.suppress(ValueError, LookupError, TypeError):  # the line that a kill cut off
            entry = json.loads(line)
            stage = entry["stage"] if entry["event"] == "started" else None
    return stage
