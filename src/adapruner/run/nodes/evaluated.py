"""Measurements of each model: perplexity, signs of breakage, scores in tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._pool import EvaluationText
from adapruner.calibration._probes import PROBED_TOKENS, probe_texts
from adapruner.evaluation._breakage import Breakage, Writing, judge_writing, measure_breakage
from adapruner.evaluation._perplexity import Perplexity, measure_perplexity
from adapruner.evaluation._tasks import Tasks, TaskScore, load_tasks, measure_tasks
from adapruner.evaluation._writing import Written, end_tokens, number_of_texts, write
from adapruner.graph.declaring import Kept
from adapruner.measurement._statistics import Statistics
from adapruner.memory import Placement
from adapruner.models._device import in_fastest_dtype
from adapruner.models._loading import load_model
from adapruner.models._places import find_model
from adapruner.planning._budget import Budget
from adapruner.progress import Reporter
from adapruner.result import IS_WANTED, Role
from adapruner.run.nodes.declared import GRAPH
from adapruner.run.nodes.forms import TENSORS, json_form
from adapruner.search._objective import at_budget, plan_candidate
from adapruner.search._result import SearchResult
from adapruner.structure._blocks import Structure
from adapruner.surgery._cut import prune_model
from adapruner.texts import Texts

# The models that are evaluated: by role, the node of the model.
_MODELS: dict[Role, str] = {
    "dense": "dense",
    "best_fixed": "best_fixed_model",
    "compensated": "compensated_model",
    "searched": "pruned_model",
    "recovered": "recovered_model",
}
# The same in the dtype of trials, in which text is written and tasks are run.
_FAST_MODELS: dict[Role, str] = {"dense": "dense_fast", "searched": "pruned_fast", "recovered": "recovered_fast"}
# Of the steps on the way nothing but the perplexity is measured.
_STEPS: tuple[Role, ...] = ("best_fixed", "compensated")


@GRAPH.costly
def pruned_fast(pruned_model: PreTrainedModel) -> PreTrainedModel:
    return in_fastest_dtype(pruned_model)


@GRAPH.costly
def recovered_fast(recovered_model: PreTrainedModel) -> PreTrainedModel:
    return in_fastest_dtype(recovered_model)


@GRAPH.costly
def best_fixed_model(
    dense: PreTrainedModel, structure: Structure, statistics: Statistics, found: SearchResult, starting_budget: Budget
) -> PreTrainedModel:
    """The dense model cut by the best of LLM-Pruner's metrics as that is used elsewhere: without compensation, though
    its trial was compensated as all are."""
    best_fixed = at_budget(structure, found.best_fixed, starting_budget)
    return prune_model(dense, structure, plan_candidate(structure, statistics, best_fixed))


@GRAPH.costly
def compensated_model(compensated: Path, tuned_scales: bool, placement: Placement) -> PreTrainedModel | None:
    """The pruned model before its scales are tuned; None if that changed nothing."""
    if not tuned_scales:
        return None
    return load_model(find_model(str(compensated)), "auto", placement.device, placement.layer_wise)


def measured_perplexity(
    model: PreTrainedModel | None, texts: dict[str, EvaluationText], reporter: Reporter
) -> dict[str, Perplexity]:
    """The perplexity of a model on every text of the report, by name; none of a step that changed nothing."""
    if model is None:
        return {}
    with reporter.stage("evaluating", sum(len(text.windows) for text in texts.values())) as advance:
        return {
            name: measure_perplexity(model, text.windows, name, advance, **text.about) for name, text in texts.items()
        }


# What the models write


def written_text(model: PreTrainedModel, tokenizer: Tokenizer, placement: Placement, reporter: Reporter) -> Written:
    """What a model writes after the built-in prompts; nothing layer by layer, where every
    generated token would read all weights."""
    if placement.layer_wise:
        return {}
    with reporter.stage("looking for breakage", number_of_texts(tokenizer)) as advance:
        return write(model, tokenizer, advance)


def judged_writing(
    dense_fast: PreTrainedModel, tokenizer: Tokenizer, written: Written, reporter: Reporter
) -> dict[str, Writing]:
    """Signs of what a model wrote, by the way of writing; the dense model reads it."""
    with reporter.stage("looking for breakage"):
        return judge_writing(tokenizer, written, end_tokens(dense_fast, tokenizer), dense_fast)


def _kept_text(role: Role, model: str) -> None:
    """Declares what is kept of the text that the model of a role writes."""
    options: dict[str, Any] = {"is_wanted": IS_WANTED[role]}
    path, needs = f"evaluation/written-{role}.safetensors", {"model": model}
    GRAPH.kept(path, TENSORS, name=f"written_{role}", needs=needs, version=2, **options)(written_text)
    path, needs, content = f"evaluation/writing-{role}.json", {"written": f"written_{role}"}, dict[str, Writing]
    GRAPH.kept(path, json_form(content), name=f"writing_{role}", needs=needs, **options)(judged_writing)


for _role, _model in _FAST_MODELS.items():
    _kept_text(_role, _model)


def measured_breakage(
    role: Role,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    written_dense: Written,
    writing: dict[str, Writing],
    seq_len: int,
    reporter: Reporter,
) -> Breakage:
    """Signs that a model is broken."""
    texts = probe_texts(tokenizer, min(seq_len, PROBED_TOKENS))
    by_dense = None if role == "dense" else written_dense
    with reporter.stage("looking for breakage", sum(len(text.windows) for text in texts.values())) as advance:
        return measure_breakage(model, tokenizer, texts, writing, by_dense, advance)


# Tasks


@GRAPH.leaf()
def used_documents(texts: Texts) -> Callable[[], list[str]]:
    return texts.used_documents


@GRAPH.in_memory
def loaded_tasks(
    tasks: tuple[str, ...],
    task_limit: int | None,
    used_documents: Callable[[], list[str]],
    pool_text: Any,
    objective_text: Any,
    recovery_texts: Any,
) -> Tasks:
    """Tasks of lm-eval, without the items whose text the model is calibrated or trained on."""
    # The documents are read when they are needed: the three texts put their content into the key.
    return load_tasks(tasks, task_limit, used_documents())


def measured_tasks(
    model: PreTrainedModel, tokenizer: Tokenizer, loaded_tasks: Tasks, reporter: Reporter
) -> dict[str, TaskScore]:
    """The scores of a model in every task, by name."""
    with reporter.stage("running tasks", len(loaded_tasks)) as advance:
        scores = measure_tasks(model, tokenizer, loaded_tasks, advance)
        return {score.task: score for score in scores}


def _kept_for(role: Role, what: str, content: Any, make: Callable[..., Any], **options: Any) -> Kept[Any]:
    """Declares what is measured of the model of a role."""
    model = (_MODELS if what == "perplexity" else _FAST_MODELS)[role]
    needs = {"model": model, "texts": "report_texts", "writing": f"writing_{role}"}
    path = f"evaluation/{what}-{role}.json"
    return GRAPH.kept(path, json_form(content), name=f"{what}_{role}", needs=needs, **options)(make)


def _is_wanted_with_tasks(role: Role) -> Callable[..., bool]:
    if role == "recovered":
        return lambda tasks, recover: bool(tasks) and recover is not None
    return lambda tasks: bool(tasks)


perplexity = {
    role: _kept_for(
        role, "perplexity", dict[str, Perplexity], measured_perplexity, version=2, is_wanted=IS_WANTED[role]
    )
    for role in _MODELS
}
_WHOLE = [role for role in _MODELS if role not in _STEPS]
scores = {
    role: _kept_for(
        role, "tasks", dict[str, TaskScore], measured_tasks, version=2, is_wanted=_is_wanted_with_tasks(role)
    )
    for role in _WHOLE
}
breakage = {
    role: _kept_for(role, "breakage", Breakage, partial(measured_breakage, role), version=6, is_wanted=IS_WANTED[role])
    for role in _WHOLE
}
