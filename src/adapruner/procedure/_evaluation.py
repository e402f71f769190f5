"""What is measured of each model: perplexity, signs of breakage, scores in tasks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from adapruner.artifacts import Artifact, artifact
from adapruner.calibration import OPENINGS, EvaluationText, probe_texts
from adapruner.config import PruneConfig
from adapruner.evaluation import (
    Breakage,
    Perplexity,
    TaskScore,
    agreement,
    continue_greedily,
    measure_perplexity,
    measure_tasks,
    repetition,
)
from adapruner.job import Job
from adapruner.models import find_model, in_fastest_dtype, load_model
from adapruner.procedure._forms import TENSORS, Windows, json_form
from adapruner.procedure._model import compensated, model, recovered, scales_were_tuned
from adapruner.procedure._search import BUDGET, candidate_at_ratio, search
from adapruner.procedure._statistics import statistics
from adapruner.procedure._windows import report_texts, report_texts_dense, vocabulary
from adapruner.result import Role, roles_of
from adapruner.search import plan_candidate
from adapruner.surgery import prune_model
from adapruner.tokens import Vocabulary

# Tokens per window of the built-in texts, of which there is little.
_PROBED_TOKENS = 128
# What each model that is evaluated is made from.
_EVALUATED: dict[Role, tuple[Artifact[Any], ...]] = {
    "dense": (),
    "best_fixed": (statistics, search),
    "compensated": (compensated, model),
    "searched": (model,),
    "recovered": (recovered,),
}
# Those of which nothing but the perplexity is measured: steps on the way.
_STEPS: tuple[Role, ...] = ("best_fixed", "compensated")


def _is_evaluated(role: Role, config: PruneConfig) -> bool:
    return role in roles_of(config)


def _has_tasks(role: Role, config: PruneConfig) -> bool:
    return bool(config.tasks) and _is_evaluated(role, config)


def _measure_perplexity(
    role: Role, job: Job, work: Path, texts: dict[str, EvaluationText], *inputs: Any
) -> dict[str, Perplexity]:
    """The perplexity of a model on every text of the report, by name; none of a step that changed nothing."""
    if role == "compensated" and not scales_were_tuned(*inputs):
        return {}
    evaluated = _model_to_evaluate(job, role, inputs)
    if role == "dense" and inputs[0] is not None:
        texts = inputs[0]
    windows = sum(len(text.windows) for text in texts.values())
    with job.prepared.reporter.stage("evaluating", windows) as advance:
        return {
            name: measure_perplexity(evaluated, text.windows, name, advance, **text.about)
            for name, text in texts.items()
        }


@artifact(
    "evaluation/continuations.safetensors",
    TENSORS,
    inputs=(vocabulary,),
    leaves="model precision",
    is_result=False,
)
def continuations(job: Job, work: Path, vocabulary: Vocabulary | None) -> Windows:
    """How the dense model continues the built-in openings, [openings, tokens], int64, in the tokens that are kept; none
    layer by layer, where every generated token would read all weights."""
    prepared = job.prepared
    if prepared.layer_wise:
        return {}
    with prepared.reporter.stage("looking for breakage"):
        return {"dense": continue_greedily(in_fastest_dtype(prepared.dense), prepared.tokenizer, OPENINGS)}


def _measure_breakage(role: Role, job: Job, work: Path, of_dense: Windows, *inputs: Any) -> Breakage:
    """Signs that a model is broken, where the dense model's continuations were made with those of its own."""
    prepared, own = job.prepared, of_dense.get("dense")
    agreed = None if own is None else 1.0
    evaluated = in_fastest_dtype(_model_to_evaluate(job, role, inputs))
    tokenizer = prepared.tokenizer_given if role == "dense" else prepared.tokenizer
    texts = probe_texts(tokenizer, min(job.config.seq_len, _PROBED_TOKENS))
    windows = sum(len(text.windows) for text in texts.values())
    with prepared.reporter.stage("looking for breakage", windows) as advance:
        if own is not None and role != "dense":
            agreed = agreement(evaluated, own)
            own = continue_greedily(evaluated, tokenizer, OPENINGS)
        return Breakage(
            repetition=None if own is None else repetition(own),
            agreement=agreed,
            texts={
                name: measure_perplexity(evaluated, text.windows, name, advance, **text.about)
                for name, text in texts.items()
            },
        )


def _measure_tasks(role: Role, job: Job, work: Path, *inputs: Any) -> dict[str, TaskScore]:
    """The scores of a model in every task, by name."""
    tasks, evaluated = job.prepared.tasks, in_fastest_dtype(_model_to_evaluate(job, role, inputs))
    tokenizer = job.prepared.tokenizer_given if role == "dense" else job.prepared.tokenizer
    with job.prepared.reporter.stage("running tasks", len(tasks)) as advance:
        return {score.task: score for score in measure_tasks(evaluated, tokenizer, tasks, advance)}


def _model_to_evaluate(job: Job, role: Role, inputs: tuple[Any, ...]) -> PreTrainedModel:
    prepared = job.prepared
    if role == "dense":
        return prepared.load_given()
    if role == "best_fixed":
        # As that metric is used elsewhere: without compensation, though its trial was compensated as all are.
        found, structure = candidate_at_ratio(job, inputs[0], inputs[1].best_fixed), prepared.structure
        return prune_model(prepared.dense, structure, plan_candidate(structure, inputs[0], found))
    return load_model(find_model(str(inputs[0])), "auto", prepared.placement.device, prepared.layer_wise)


perplexity: dict[Role, Artifact[dict[str, Perplexity]]] = {
    role: artifact(
        f"evaluation/perplexity-{role}.json",
        json_form(dict[str, Perplexity]),
        inputs=(report_texts, *([report_texts_dense] if role == "dense" else inputs)),
        options=BUDGET if role == "best_fixed" else "",
        leaves="model precision",
        is_wanted=partial(_is_evaluated, role),
        is_result=False,
    )(partial(_measure_perplexity, role))
    for role, inputs in _EVALUATED.items()
}
scores: dict[Role, Artifact[dict[str, TaskScore]]] = {
    role: artifact(
        f"evaluation/tasks-{role}.json",
        json_form(dict[str, TaskScore]),
        inputs=_EVALUATED[role],
        options="tasks task_limit",
        leaves="model precision pool_text objective_text recovery_text",
        check=lambda job: job.prepared.tasks,
        is_wanted=partial(_has_tasks, role),
        is_result=False,
    )(partial(_measure_tasks, role))
    for role in _EVALUATED
    if role not in _STEPS
}

breakage: dict[Role, Artifact[Breakage]] = {
    role: artifact(
        f"evaluation/breakage-{role}.json",
        json_form(Breakage),
        inputs=(continuations, *_EVALUATED[role]),
        options="seq_len",
        leaves="model precision",
        is_wanted=partial(_is_evaluated, role),
        is_result=False,
        version=3,
    )(partial(_measure_breakage, role))
    for role in _EVALUATED
    if role not in _STEPS
}
