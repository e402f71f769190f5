"""What a run folder holds that the report shows, as far as the run has got."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file

from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError, reason
from adapruner.evaluation import Breakage, Perplexity, Speed, TaskScore
from adapruner.models import find_model, load_tokenizer
from adapruner.planning import PruningPlan
from adapruner.progress import Reporter, StageCost
from adapruner.result import ModelNumbers, Role, RunResult, roles_of, verdict_of
from adapruner.run import RunFolder
from adapruner.search import History, Levelled, SearchResult, StudyPlace, read_history, sqlite_url
from adapruner.tokens import Vocabulary

T = TypeVar("T")


@dataclass(frozen=True)
class Contents:
    """What there is of one ratio of a run.

    Attributes:
        path: the folder with its artifacts.
        state: whether it is finished, a command is running, or it was stopped.
        stage: the current stage of a running command.
        config: the options, with this ratio alone.
        plan: which groups are kept; None before the search has ended, as are `search` and `levelled`.
        result: once it is finished.
        models: what was measured of each model so far.
        samples: the texts of the chosen calibration samples, once there is a tokenizer to read them with, by their
            numbers in the pool.
        stages: seconds and peak memory of every finished stage.
        weight_bytes: of the weights of the final model on disk.
        speed: of the dense and the final model, where `adapruner benchmark --output` wrote it here.
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
        """The model that the run is about, as far as it has got; None before anything is pruned."""
        return self.models[-1] if len(self.models) > 1 else None

    @property
    def final_folder(self) -> Path:
        """Where its checkpoint is."""
        return self.path / ("recovered" if self.final and self.final.role == "recovered" else "model")


def read_contents(run: RunFolder, config: PruneConfig) -> Contents:
    """Reads what there is of one ratio.

    Args:
        config: the options of the run, with this ratio alone.

    Raises:
        AdaPrunerError: something in the folder cannot be read.
    """
    folder = run.at_ratio(config.ratio[0], run.read_config())
    try:
        return _read(run, folder, config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise AdaPrunerError(f"cannot read the run in {folder.path}: {reason(error)}") from error


def _read(run: RunFolder, folder: RunFolder, config: PruneConfig) -> Contents:
    plan = PruningPlan.load(folder.path / "plan.json") if (folder.path / "plan.json").is_file() else None
    search = _content(folder.path / "search.json", SearchResult)
    result = _content(folder.path / "result.json", RunResult) if _is_current("result.json", run, folder) else None
    levelled = _content(folder.path / "levelled.json", Levelled) if config.levels_widths else None
    is_running = result is None and run.is_running()
    saved = folder.recovered if config.recover and folder.recovered.is_dir() else folder.model
    models = result.models if result else tuple(_models(run, folder, config, plan))
    return Contents(
        path=folder.path,
        state="finished" if result else "running" if is_running else "stopped",
        stage=_current_stage(run.log) if is_running else None,
        config=config,
        history=search or _running_history(run, folder),
        plan=plan,
        search=search,
        levelled=result.levelled if result else levelled,
        result=result,
        models=models,
        samples=_samples(run, folder, search.best.samples) if search else {},
        stages=result.stages if result else Reporter(run.log).finished_stages(),
        weight_bytes=sum(file.stat().st_size for file in saved.glob("*.safetensors")),
        speed=_speed(folder, models),
    )


def _content(path: Path, of: type[T]) -> T | None:
    return TypeAdapter(of).validate_json(path.read_bytes()) if path.is_file() else None


def _running_history(run: RunFolder, folder: RunFolder) -> History:
    record = folder.record("search.json")
    if record is None or not run.study.is_file():
        return History()
    return read_history(StudyPlace(sqlite_url(run.study), record.key))


def _models(run: RunFolder, folder: RunFolder, config: PruneConfig, plan: PruningPlan | None) -> list[ModelNumbers]:
    """The models that have been made, or measured."""
    models = []
    broken: dict[Role, Breakage | None] = {}
    made = {"searched": folder.model.is_dir(), "recovered": folder.recovered.is_dir()}
    for role in roles_of(config):
        evaluation = (run if role == "dense" else folder).path / "evaluation"
        perplexity = _content(evaluation / f"perplexity-{role}.json", dict[str, Perplexity])
        tasks = _content(evaluation / f"tasks-{role}.json", dict[str, TaskScore])
        broken[role] = _content(evaluation / f"breakage-{role}.json", Breakage)
        if plan and (role == "dense" or perplexity or tasks or made.get(role)):
            chosen = _content(run.path / "vocabulary.json", Vocabulary) if config.vocabulary else None
            of_vocabulary = chosen.summary.removed_parameters if chosen else 0
            parameters = plan.total_parameters + (of_vocabulary if role == "dense" else -plan.removed_parameters)
            models.append(
                ModelNumbers(
                    role=role,
                    parameters=parameters,
                    perplexity=perplexity or {},
                    tasks=tasks or {},
                    breakage=broken[role],
                    verdict=verdict_of(role, broken),
                )
            )
    return models


def _speed(folder: RunFolder, models: tuple[ModelNumbers, ...]) -> tuple[Speed, Speed] | None:
    """Told apart by their parameters: what was measured of another cut is not shown."""
    measured = _content(folder.speed, dict[str, Speed]) or {}
    by_size = {speed.parameters: speed for speed in measured.values()}
    pair = [by_size.get(model.parameters) for model in (models[0], models[-1])] if len(models) > 1 else []
    dense, final = pair or (None, None)
    return (dense, final) if dense and final else None


def _samples(run: RunFolder, folder: RunFolder, numbers: tuple[int, ...]) -> dict[int, str | None]:
    """The saved model brings the tokenizer."""
    windows = run.path / "windows.safetensors"
    if not windows.is_file() or not folder.model.is_dir():
        return dict.fromkeys(numbers)
    pool = load_file(windows)["pool"]
    if run.left_out.is_file():
        left_out = json.loads(run.left_out.read_text(encoding="utf-8"))["windows"].get("pool", [])
        pool = pool[[number for number in range(len(pool)) if number not in left_out]]
    tokenizer = load_tokenizer(find_model(str(folder.model)))
    return {number: str(tokenizer.decode(pool[number].tolist())) for number in numbers}


def _is_current(name: str, run: RunFolder, folder: RunFolder) -> bool:
    """Whether an artifact was made from what is in the run now."""
    record = folder.record(name) or run.record(name)
    if record is None:
        return False
    inputs = {one: folder.record(one) or run.record(one) for one in record.inputs}
    return all(one and one.key == record.inputs[name] for name, one in inputs.items())


def _current_stage(log: Path) -> str | None:
    """The stage that was begun and has not ended."""
    stage = None
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        with contextlib.suppress(ValueError, LookupError, TypeError):  # the line that a kill cut off
            entry = json.loads(line)
            stage = entry["stage"] if entry["event"] == "started" else None
    return stage
