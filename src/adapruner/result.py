"""What a run has to say: the outcome of the search, and `result.json` with its table."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.table import Table

from adapruner.config import PruneConfig
from adapruner.evaluation import Perplexity
from adapruner.planning import PruningPlan
from adapruner.run_folder import RunFolder
from adapruner.search import Candidate

RESULT_SCHEMA_VERSION = 1


class SearchOutcome(BaseModel):
    """What the search leaves for the stages after it: the best point, and the best fixed metric to compare with."""

    ratio: float
    trials: int
    best: Candidate
    best_loss: float
    best_trial: int
    best_fixed: Candidate
    best_fixed_loss: float
    best_fixed_name: str
    stopped_early: int


@dataclass(frozen=True)
class PruneResult:
    """A finished run.

    Attributes:
        output: the run folder.
        plan: which groups stayed.
        result: the content of `result.json`.
    """

    output: Path
    plan: PruningPlan
    result: dict[str, Any]

    @property
    def model_folder(self) -> Path:
        """The pruned checkpoint; `adapruner.load` reads it."""
        return RunFolder(self.output).model

    def table(self) -> Table:
        """Parameters and perplexities: dense, best fixed metric, searched."""
        return _table(self.result)


def read_result(run: RunFolder) -> PruneResult:
    """The result of a finished run, as its files say it."""
    return PruneResult(run.path, PruningPlan.load(run.plan), json.loads(run.result.read_text()))


def build_result(
    config: PruneConfig,
    plan: PruningPlan,
    parameters_after: int,
    outcome: SearchOutcome,
    perplexities: dict[str, dict[str, Perplexity]],
    stages: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """The content of `result.json`: every number with what it needs to be had again.

    Args:
        parameters_after: counted in the saved checkpoint.
        perplexities: by text, then by model (`dense`, `best_fixed`, `searched`); `best_fixed` as that metric is used
            elsewhere, without compensation, though trials of it are compensated as all are.
        stages: seconds and peak memory of every stage.
    """
    return {
        "schema_version": RESULT_SCHEMA_VERSION,
        "config": config.model_dump(mode="json"),
        "parameters": {
            "before": plan.total_parameters,
            "after": parameters_after,
            "removed_share": 1 - parameters_after / plan.total_parameters,
        },
        "plan_hash": plan.hash,
        "search": outcome.model_dump(),
        "perplexity": {
            text: {name: value.as_json() for name, value in by_model.items()} for text, by_model in perplexities.items()
        },
        "stages": stages,
        "versions": {name: version(name) for name in ("adapruner", "torch", "transformers", "optuna")}
        | {"python": platform.python_version()},
    }


def _table(result: dict[str, Any]) -> Table:
    """Parameters and perplexities of a `result.json`: dense, best fixed metric, searched."""
    parameters, perplexity = result["parameters"], result["perplexity"]
    protocols = [by_model["searched"]["protocol"] for by_model in perplexity.values()]
    table = Table(caption="\n".join(protocols), caption_justify="left")
    table.title = f"{result['config']['model']}: {parameters['removed_share']:.1%} of all parameters removed"
    table.add_column("model")
    table.add_column("parameters", justify="right")
    for text in perplexity:
        table.add_column(f"perplexity\n{text}", justify="right")
    not_compensated = ", not compensated" if result["config"]["compensation"] != "none" else ""
    names = {
        "dense": "dense",
        "best_fixed": f"best fixed metric ({result['search']['best_fixed_name']}){not_compensated}",
        "searched": "searched",
    }
    for name, title in names.items():
        count = parameters["before"] if name == "dense" else parameters["after"]
        table.add_row(title, f"{count:,}", *(f"{by_model[name]['perplexity']:.2f}" for by_model in perplexity.values()))
    return table
