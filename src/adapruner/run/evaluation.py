"""Measurements of each model, the result that holds them, and the page that shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.progress import Reporter, StageCost
from adapruner.budget.plan import PruningPlan
from adapruner.checkpoint import write_card
from adapruner.evaluation.abilities import Abilities, measure_abilities, number_of_answers, windows_of, write_answers
from adapruner.evaluation.perplexity import Perplexity, measure_perplexity
from adapruner.evaluation.tasks import Tasks, TaskScore, load_tasks, measure_tasks
from adapruner.graph.nodes import Form
from adapruner.measurement.taylor import Statistics
from adapruner.model.config import load_config
from adapruner.model.device import describe_device, in_fastest_dtype
from adapruner.model.loading import empty_model
from adapruner.model.places import ModelLocation, find_model
from adapruner.options import PruneConfig
from adapruner.report.card import model_card
from adapruner.report.result import IS_WANTED, ModelNumbers, Role, RunResult, roles_of, verdict_of
from adapruner.run.folder import RunFolder
from adapruner.run.graph import TENSORS, json_form
from adapruner.run.models import GRAPH as GRAPH
from adapruner.run.result import page_of
from adapruner.search.judging import Costs, plan_candidate
from adapruner.search.result import SearchResult
from adapruner.structure.blocks import Structure
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from adapruner.text.uses import Texts
from adapruner.text.windows import EvaluationText, Text
from adapruner.train.healing import Healing

PAGE: Form[str] = Form(
    lambda page, path: path.write_text(page, encoding="utf-8"), lambda path: path.read_text(encoding="utf-8")
)
# The models that are evaluated: by role, the node of the model.
_MODELS: dict[Role, str] = {"dense": "dense", "best_fixed": "best_fixed_model", "searched": "pruned_model"}
# The same in the dtype of trials, in which abilities are measured and tasks are run; of the best fixed metric nothing
# but the perplexity is measured.
_FAST_MODELS: dict[Role, str] = {"dense": "dense_fast", "searched": "pruned_fast"}


@GRAPH.costly
def pruned_fast(pruned_model: PreTrainedModel) -> PreTrainedModel:
    return in_fastest_dtype(pruned_model)


@GRAPH.costly
def best_fixed_model(
    dense: PreTrainedModel, structure: Structure, statistics: Statistics, found: SearchResult, counts: list[int]
) -> PreTrainedModel:
    """The dense model cut by the best of LLM-Pruner's metrics as that is used elsewhere: without compensation, though
    its trial was compensated as all are."""
    assert found.best_fixed is not None
    return prune_model(dense, structure, plan_candidate(structure, statistics, found.best_fixed, counts))


def measured_perplexity(
    model: PreTrainedModel, texts: dict[str, EvaluationText], reporter: Reporter
) -> dict[str, Perplexity]:
    """The perplexity of a model on every text of the report, by name."""
    with reporter.stage("evaluating", sum(len(text.windows) for text in texts.values())) as advance:
        return {
            name: measure_perplexity(model, text.windows, name, advance, **text.about) for name, text in texts.items()
        }


# What the models can do


@GRAPH.kept("evaluation/answers.safetensors", TENSORS)
def answers(dense_fast: PreTrainedModel, tokenizer: Tokenizer, reporter: Reporter) -> dict[str, torch.Tensor]:
    """What the dense model writes for both models to read, and predicts in it."""
    with reporter.stage("writing answers", number_of_answers()) as advance:
        return write_answers(dense_fast, tokenizer, advance)


def measured_abilities(
    model: PreTrainedModel, tokenizer: Tokenizer, answers: dict[str, torch.Tensor], reporter: Reporter
) -> Abilities:
    """What a model can do."""
    with reporter.stage("comparing abilities", sum(map(len, windows_of(answers).values()))) as advance:
        return measure_abilities(model, tokenizer, answers, advance=advance)


# Tasks


@GRAPH.leaf()
def used_documents(texts: Texts) -> Callable[[], list[str]]:
    return texts.used_documents


@GRAPH.in_memory
def loaded_tasks(
    tasks: tuple[str, ...],
    task_limit: int | None,
    used_documents: Callable[[], list[str]],
    calibration_texts: Any,
    objective_texts: Any,
) -> Tasks:
    """Tasks of lm-eval, without the items whose text the model is calibrated or trained on."""
    # The documents are read when they are needed: the texts put their content into the key.
    return load_tasks(tasks, task_limit, used_documents())


def measured_tasks(
    model: PreTrainedModel, tokenizer: Tokenizer, loaded_tasks: Tasks, reporter: Reporter
) -> dict[str, TaskScore]:
    """The scores of a model in every task, by name."""
    with reporter.stage("running tasks", len(loaded_tasks)) as advance:
        scores = measure_tasks(model, tokenizer, loaded_tasks, advance)
        return {score.task: score for score in scores}


def _keep(
    what: str, role: Role, form: Form[Any], make: Callable[..., Any], needs: dict[str, str], **options: Any
) -> None:
    """Declares what is kept about the model of a role."""
    path = f"evaluation/{what}-{role}.{'safetensors' if form is TENSORS else 'json'}"
    GRAPH.kept(path, form, name=f"{what}_{role}", needs=needs, **{"is_wanted": IS_WANTED[role]} | options)(make)


for _role, _model in _MODELS.items():
    _needs = {"model": _model, "texts": "report_texts"}
    _keep("perplexity", _role, json_form(dict[str, Perplexity]), measured_perplexity, _needs, version=2)
for _role, _model in _FAST_MODELS.items():
    _needs, _wanted = {"model": _model}, {"is_wanted": lambda tasks: tasks}
    _keep("tasks", _role, json_form(dict[str, TaskScore]), measured_tasks, _needs, version=2, **_wanted)
for _role, _model in _FAST_MODELS.items():
    _keep("abilities", _role, json_form(Abilities), measured_abilities, {"model": _model})


# The result

Measured = tuple[dict[str, Perplexity] | None, dict[str, TaskScore] | None, Abilities | None]


@GRAPH.in_memory
def measured(
    perplexity_dense: dict[str, Perplexity],
    perplexity_best_fixed: dict[str, Perplexity] | None,
    perplexity_searched: dict[str, Perplexity],
    tasks_dense: dict[str, TaskScore] | None,
    tasks_searched: dict[str, TaskScore] | None,
    abilities_dense: Abilities,
    abilities_searched: Abilities,
) -> dict[Role, Measured]:
    """Perplexity, scores in tasks and abilities, as far as they were measured."""
    return {
        "dense": (perplexity_dense, tasks_dense, abilities_dense),
        "best_fixed": (perplexity_best_fixed, None, None),
        "searched": (perplexity_searched, tasks_searched, abilities_searched),
    }


@GRAPH.kept("result.json", json_form(RunResult), version=7, is_result=True, is_record=True, beside=("model/README.md",))
def result(
    config: PruneConfig,
    location: ModelLocation,
    windows: dict[str, Text],
    costs: Costs | None,
    found: SearchResult | None,
    plan: PruningPlan,
    pruned: Path,
    healed: Healing | None,
    measured: dict[Role, Measured],
    main_device: torch.device,
    stage_costs: Callable[[], dict[str, StageCost]],
) -> RunResult:
    """All numbers of a run; the model card is written too, which shows them."""
    config_after = load_config(find_model(str(pruned)))
    after = build_structure(empty_model(config_after)).total_parameters
    abilities = {role: known for role, (_, _, known) in measured.items()}
    numbers = [
        ModelNumbers(
            role=role,
            parameters=plan.total_parameters if role == "dense" else after,
            perplexity=measured[role][0] or {},
            tasks=measured[role][1] or {},
            abilities=abilities[role],
            verdict=verdict_of(role, abilities),
        )
        for role in roles_of(config)
    ]
    result = RunResult(
        config=config,
        plan_hash=plan.hash,
        costs=costs,
        search=found,
        healing=healed,
        models=tuple(numbers),
        windows={use: {kind: len(own) for kind, own in text.by_kind.items()} for use, text in windows.items()},
        stages=stage_costs(),
        device=describe_device(main_device),
    )
    write_card(pruned, model_card(location, config_after, plan, result))
    return result


@GRAPH.kept("report.html", PAGE, is_result=True)
def report(result: RunResult, plan: PruningPlan, run_folder: RunFolder) -> str:
    """The page that shows the run."""
    return page_of(run_folder, result, plan)


GRAPH.check()
