"""The numbers of a run, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from adapruner.card import model_card
from adapruner.checkpoint._folder import write_card
from adapruner.config import PruneConfig
from adapruner.evaluation._breakage import Breakage
from adapruner.evaluation._perplexity import Perplexity
from adapruner.evaluation._tasks import TaskScore
from adapruner.graph.folder import RunFolder
from adapruner.graph.records import Form
from adapruner.models._config import load_config
from adapruner.models._device import describe_device
from adapruner.models._loading import empty_model
from adapruner.models._places import ModelLocation, find_model
from adapruner.planning._plan import PruningPlan
from adapruner.progress import StageCost
from adapruner.recovery._folder import read_record
from adapruner.report._page import render_report
from adapruner.result import ModelNumbers, Role, RunResult, roles_of, verdict_of
from adapruner.run.nodes.declared import GRAPH
from adapruner.run.nodes.forms import Windows, json_form
from adapruner.search._levelling import Levelled
from adapruner.search._result import SearchResult
from adapruner.structure._build import build_structure

PAGE: Form[str] = Form(
    lambda page, path: path.write_text(page, encoding="utf-8"), lambda path: path.read_text(encoding="utf-8")
)


@GRAPH.in_memory
def perplexities(
    perplexity_dense: dict[str, Perplexity],
    perplexity_best_fixed: dict[str, Perplexity] | None,
    perplexity_compensated: dict[str, Perplexity] | None,
    perplexity_searched: dict[str, Perplexity],
    perplexity_recovered: dict[str, Perplexity] | None,
) -> dict[Role, dict[str, Perplexity] | None]:
    return {
        "dense": perplexity_dense,
        "best_fixed": perplexity_best_fixed,
        "compensated": perplexity_compensated,
        "searched": perplexity_searched,
        "recovered": perplexity_recovered,
    }


@GRAPH.in_memory
def task_scores(
    tasks_dense: dict[str, TaskScore] | None,
    tasks_searched: dict[str, TaskScore] | None,
    tasks_recovered: dict[str, TaskScore] | None,
) -> dict[Role, dict[str, TaskScore] | None]:
    return {"dense": tasks_dense, "searched": tasks_searched, "recovered": tasks_recovered}


@GRAPH.in_memory
def breakages(
    breakage_dense: Breakage, breakage_searched: Breakage, breakage_recovered: Breakage | None
) -> dict[Role, Breakage | None]:
    return {"dense": breakage_dense, "searched": breakage_searched, "recovered": breakage_recovered}


@GRAPH.kept(
    "result.json",
    json_form(RunResult),
    version=4,
    is_result=True,
    is_record=True,
    beside=("model/README.md", "recovered/README.md"),
)
def result(
    config: PruneConfig,
    location: ModelLocation,
    windows: Windows,
    self_written: Windows | None,
    found: SearchResult,
    levelled: Levelled | None,
    plan: PruningPlan,
    pruned: Path,
    tuned_scales: bool,
    recovered: Path | None,
    perplexities: dict[Role, dict[str, Perplexity] | None],
    task_scores: dict[Role, dict[str, TaskScore] | None],
    breakages: dict[Role, Breakage | None],
    main_device: torch.device,
    stage_costs: Callable[[], dict[str, StageCost]],
) -> RunResult:
    """All numbers of a run; the model cards are written too, which show them."""
    config_after = load_config(find_model(str(pruned)))
    after = build_structure(empty_model(config_after)).total_parameters
    numbers = [
        ModelNumbers(
            role=role,
            parameters=plan.total_parameters if role == "dense" else after,
            perplexity=perplexities[role] or {},
            tasks=task_scores.get(role) or {},
            breakage=breakages.get(role),
            verdict=verdict_of(role, breakages),
        )
        for role in roles_of(config)
        if role != "compensated" or tuned_scales
    ]
    written = {"self": len(self_written["compensation"])} if self_written else {}
    result = RunResult(
        config=config,
        plan_hash=plan.hash,
        search=found,
        levelled=levelled,
        recovery=read_record(recovered) if recovered else None,
        models=tuple(numbers),
        windows={use: len(tokens) for use, tokens in windows.items()} | written,
        tuned_scales=tuned_scales,
        stages=stage_costs(),
        device=describe_device(main_device),
    )
    folders: dict[Role, Path | None] = {"searched": pruned, "recovered": recovered}
    for role, folder in folders.items():
        if folder:
            write_card(folder, model_card(location, config_after, plan, result, role))
    return result


@GRAPH.kept("report.html", PAGE, is_result=True, is_page=True)
def report(result: RunResult, run_folder: RunFolder) -> str:
    """The page that shows the run."""
    return render_report(run_folder, result)
