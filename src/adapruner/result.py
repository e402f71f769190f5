"""What a run has to say: the outcome of the search, and `result.json` with its table."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from adapruner.config import PruneConfig
from adapruner.evaluation import mean_accuracies
from adapruner.planning import PruningPlan
from adapruner.run_folder import RunFolder
from adapruner.search import SearchResult

RESULT_SCHEMA_VERSION = 2

# From when on people are told about it: a perplexity that has grown so many times, so little text, widths so odd.
_MUCH_WORSE, _FEW_WINDOWS, _FRIENDLY_MULTIPLE = 2.0, 256, 8

TITLES = {"dense": "dense", "best_fixed": "best fixed metric", "searched": "searched", "recovered": "recovered"}


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
        """The pruned checkpoint, the recovered one if it was trained; `adapruner.load` reads it."""
        run = RunFolder(self.output)
        return run.recovered if self.result["recovery"] else run.model

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return RunFolder(self.output).report

    def advice(self) -> list[str]:
        """What about the outcome should not go unseen, and what helps; a line each."""
        return [*_about_perplexity(self.result), *_about_text(self.result), *_about_widths(self.plan)]

    def tables(self) -> list[Table]:
        """Parameters and perplexities of the dense, the best fixed metric's, the searched and the recovered model; and
        what they score in tasks, if any were run."""
        return [_table(self.result), *([_task_table(self.result)] if self.result["tasks"] else [])]


def read_result(run: RunFolder) -> PruneResult:
    """The result of a finished run, as its files say it."""
    return PruneResult(run.path, PruningPlan.load(run.plan), json.loads(run.result.read_text()))


def build_result(
    config: PruneConfig,
    plan: PruningPlan,
    parameters_after: int,
    outcome: SearchResult,
    recovery: dict[str, Any] | None,
    perplexities: dict[str, dict[str, Any]],
    scores: dict[str, dict[str, Any]],
    stages: dict[str, dict[str, float]],
    windows: dict[str, int],
) -> dict[str, Any]:
    """The content of `result.json`: every number with what it needs to be had again.

    Args:
        parameters_after: counted in the saved checkpoint.
        recovery: the record of the training afterwards, if there was any.
        perplexities: by model (`dense`, `best_fixed`, `searched`, `recovered`), then by text; `best_fixed` as that
            metric is used elsewhere, without compensation, though trials of it are compensated as all are.
        scores: by model, then by task.
        stages: seconds and peak memory of every stage.
        windows: how many there were, by use.
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
        "search": outcome.model_dump(exclude={"points", "ranges", "importance"}),
        "recovery": recovery,
        "perplexity": by_text(perplexities),
        "tasks": by_text(scores),
        "task_means": {
            name: mean_accuracies(score["metrics"] for score in by_task.values()) for name, by_task in scores.items()
        },
        "windows": windows,
        "stages": stages,
        "versions": {name: version(name) for name in ("adapruner", "torch", "transformers", "optuna")}
        | {"python": platform.python_version()},
    }


def by_text(by_model: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Numbers by model and text, or task, the other way round."""
    texts = list(next(iter(by_model.values()), {}))
    return {text: {name: own[text] for name, own in by_model.items() if text in own} for text in texts}


def _table(result: dict[str, Any]) -> Table:
    parameters, perplexity = result["parameters"], result["perplexity"]
    protocols = [by_model["searched"]["protocol"] for by_model in perplexity.values()]
    table = Table(caption="\n".join(protocols), caption_justify="left")
    table.title = f"{result['config']['model']}: {parameters['removed_share']:.1%} of all parameters removed"
    table.add_column("model")
    table.add_column("parameters", justify="right")
    for text in perplexity:
        table.add_column(f"perplexity\n{text}", justify="right")
    not_compensated = ", not compensated" if result["config"]["compensation"] != "none" else ""
    titles = TITLES | {"best_fixed": f"best fixed metric ({result['search']['best_fixed_name']}){not_compensated}"}
    for name, title in titles.items():
        if name == "recovered" and not result["recovery"]:
            continue
        count = parameters["before"] if name == "dense" else parameters["after"]
        table.add_row(title, f"{count:,}", *(f"{by_model[name]['perplexity']:.2f}" for by_model in perplexity.values()))
    return table


def _task_table(result: dict[str, Any]) -> Table:
    models = list(result["task_means"])
    table = Table("task", "metric", *(TITLES[name] for name in models), caption_justify="left")
    for task, by_model in result["tasks"].items():
        for metric in by_model["dense"]["metrics"]:
            cells = (_with_error(by_model[name], metric) for name in models)
            table.add_row(task, metric, *cells)
    for metric in result["task_means"]["dense"]:
        table.add_row("mean", metric, *(f"{result['task_means'][name][metric]:.4f}" for name in models))
    table.caption = "\n".join(by_model["dense"]["protocol"] for by_model in result["tasks"].values())
    return table


def _with_error(score: dict[str, Any], metric: str) -> str:
    error = score["standard_errors"].get(metric)
    return f"{score['metrics'][metric]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _about_perplexity(result: dict[str, Any]) -> Iterator[str]:
    last = "recovered" if result["recovery"] else "searched"
    training = "training it longer" if result["recovery"] else "--recover SRC, which trains it,"
    for text, by_model in result["perplexity"].items():
        dense, pruned = (by_model[name]["perplexity"] for name in ("dense", last))
        if not pruned <= _MUCH_WORSE * dense:
            yield f"perplexity on {text} rose from {dense:.1f} to {pruned:.1f}: {training} or a lower --ratio helps"


def _about_text(result: dict[str, Any]) -> Iterator[str]:
    count = result["windows"].get("compensation")
    if count is not None and count < _FEW_WINDOWS:
        yield (
            f"what stays was fitted on {count} windows of text: more calibration text, or more --compensation-windows,"
            " makes a better model"
        )


def _about_widths(plan: PruningPlan) -> Iterator[str]:
    odd = [block for block in plan.blocks if block.kind == "channels" and len(block.kept) % _FRIENDLY_MULTIPLE]
    if odd:
        yield (
            f"the feed-forward widths of {len(odd)} layers are no multiples of {_FRIENDLY_MULTIPLE}, with which most"
            " devices are faster: --round-to 32 keeps to those"
        )
