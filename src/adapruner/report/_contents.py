"""What a run folder holds that the report shows, as far as the run has got."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file

from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import mean_accuracies
from adapruner.models import find_model, load_tokenizer
from adapruner.planning import PruningPlan
from adapruner.progress import Reporter
from adapruner.result import by_text
from adapruner.run_folder import RunFolder
from adapruner.search import History, SearchResult, StudyPlace, read_history, sqlite_url


@dataclass(frozen=True)
class Sample:
    """A calibration sample: its number in the pool, and its text once there is a tokenizer to read it with."""

    number: int
    text: str | None


@dataclass(frozen=True)
class Contents:
    """What there is of a run.

    Attributes:
        state: whether it is finished, a process is at it, or it was stopped.
        stage: what the process that leads it is at.
        plan: which groups stay; None before the search has ended, as is `outcome`.
        result: the content of `result.json`, once it is finished.
        perplexity: by text, then by model.
        tasks: scores by task, then by model.
        task_means: mean accuracies by model.
        samples: the calibration samples that were chosen.
        stages: seconds and peak memory of every finished stage.
        weight_bytes: of the saved models' weights on disk, by model.
    """

    path: Path
    state: Literal["finished", "running", "stopped"]
    stage: str | None
    config: PruneConfig
    history: History
    plan: PruningPlan | None
    outcome: SearchResult | None
    result: dict[str, Any] | None
    perplexity: dict[str, dict[str, dict[str, Any]]]
    tasks: dict[str, dict[str, dict[str, Any]]]
    task_means: dict[str, dict[str, float]]
    samples: list[Sample]
    stages: dict[str, dict[str, float]]
    weight_bytes: dict[str, int]

    @property
    def models(self) -> list[str]:
        """The models that there are numbers of, in the order in which they were made."""
        seen = {"dense": None} | dict.fromkeys(self.weight_bytes)
        for by_model in [*self.perplexity.values(), *self.tasks.values()]:
            seen |= dict.fromkeys(by_model)
        return [name for name in ("dense", "best_fixed", "searched", "recovered") if name in seen]

    @property
    def final(self) -> str:
        """The model that the run is about, as far as it has got."""
        return self.models[-1]


def read_contents(run: RunFolder) -> Contents:
    """Reads a run folder.

    Raises:
        AdaPrunerError: it holds no run, or something in it cannot be read.
    """
    if not run.config.is_file():
        raise AdaPrunerError(f"{run.path} holds no run: name the folder that adapruner prune wrote")
    config = PruneConfig.load(run.config)
    try:
        return _read(run, config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise AdaPrunerError(f"cannot read the run in {run.path}: {error}") from error


def _read(run: RunFolder, config: PruneConfig) -> Contents:
    result = _json(run.result)
    outcome = SearchResult.model_validate_json(run.search.read_text()) if run.search.is_file() else None
    measured = _json(run.evaluation) or {}
    scores = measured.get("tasks", {})
    means = {name: mean_accuracies(score["metrics"] for score in own.values()) for name, own in scores.items()}
    is_running = result is None and run.is_led()
    return Contents(
        path=run.path,
        state="finished" if result else "running" if is_running else "stopped",
        stage=_current_stage(run.log) if is_running else None,
        config=config,
        history=outcome or read_history(StudyPlace(sqlite_url(run.path / "study.db"), "adapruner")),
        plan=PruningPlan.load(run.plan) if run.plan.is_file() else None,
        outcome=outcome,
        result=result,
        perplexity=result["perplexity"] if result else by_text(measured.get("perplexity", {})),
        tasks=result["tasks"] if result else by_text(scores),
        task_means=result["task_means"] if result else means,
        samples=_samples(run, outcome.best.samples) if outcome else [],
        stages=result["stages"] if result else Reporter(run.log).finished_stages(),
        weight_bytes={
            name: size
            for name, folder in {"searched": run.model, "recovered": run.recovered}.items()
            if (size := sum(file.stat().st_size for file in folder.glob("*.safetensors")))
        },
    )


def _json(path: Path) -> dict[str, Any] | None:
    content: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return content


def _samples(run: RunFolder, numbers: tuple[int, ...]) -> list[Sample]:
    """The saved model brings the tokenizer."""
    if not run.windows.is_file() or not run.model.is_dir():
        return [Sample(number, None) for number in numbers]
    pool = load_file(run.windows)["pool"]
    tokenizer = load_tokenizer(find_model(str(run.model)))
    return [Sample(number, str(tokenizer.decode(pool[number].tolist()))) for number in numbers]


def _current_stage(log: Path) -> str | None:
    """The stage that was begun and has not ended."""
    stage = None
    for line in log.read_text().splitlines() if log.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):  # the line that a kill cut off
            entry = json.loads(line)
            stage = entry["stage"] if entry["event"] == "started" else None
    return stage
