"""From a plan to a saved model and its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from adapruner.calibration import SELF_GENERATED
from adapruner.checkpoint import model_card, save_checkpoint, write_card
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import measure_perplexity, measure_tasks
from adapruner.job import Job
from adapruner.measurement import StoredMoments
from adapruner.models import empty_model, find_model, in_fastest_dtype, load_config, load_model
from adapruner.planning import PruningPlan
from adapruner.processes import this_process
from adapruner.progress import Reporter
from adapruner.recovery import read_record, recover_into, total_steps, window_examples, working_folder
from adapruner.stages._choosing import compensation_of
from adapruner.structure import build_structure
from adapruner.surgery import prune_model, refit_sequentially


def stage_save(
    job: Job,
    model: PreTrainedModel,
    plan: PruningPlan,
    moments: StoredMoments | None,
    windows: dict[str, Tensor],
    reporter: Reporter,
) -> None:
    if job.run.model.is_dir():
        return
    compensation = compensation_of(job, moments)
    with reporter.stage("cutting", 1) as advance:
        pruned = prune_model(model, job.structure, plan, compensation)
        advance()
    if compensation and job.fits_sequentially:
        with reporter.stage("compensating", job.structure.layers) as advance:
            text = windows["compensation"]
            refit_sequentially(model, pruned, job.structure, plan, compensation, text, advance)
    with reporter.stage("saving", 1) as advance:
        save_checkpoint(pruned, job.tokenizer, job.run.model)
        job.run.name_model(job.run.model)
        advance()


def stage_recover(
    job: Job, model: PreTrainedModel, windows: dict[str, Tensor], reporter: Reporter
) -> dict[str, Any] | None:
    """Trains the saved model again, on the text or on what the dense model predicts; returns the record of it."""
    config, run = job.config, job.run
    if config.recover is None:
        return None
    record = read_record(run.recovered)
    if record is None:
        examples = job.examples or window_examples(windows["recovery"], config.recover, config.recovery)
        pruned = load_model(find_model(str(run.model)), "auto", config.device)
        # Of text that the model wrote itself there is nothing to learn but its predictions.
        of_model = config.recover == SELF_GENERATED
        teacher = None if config.recovery.learns_labels(examples.instructions, of_model) else model
        about = {"model": config.model, "data": config.recover, **config.recovery.model_dump(mode="json")}
        try:
            with reporter.stage("recovering", total_steps(examples, config.recovery)) as advance:
                work = working_folder(run.recovered)
                record = recover_into(
                    run.recovered,
                    pruned,
                    job.tokenizer,
                    examples,
                    config.recovery,
                    teacher,
                    about,
                    work,
                    progress=advance,
                )
        except AdaPrunerError as error:
            raise AdaPrunerError(
                f"{error}. The pruned model is whole: adapruner recover {run.model} trains it with other options"
            ) from None
        if this_process().leads:
            run.name_model(run.recovered)
    return record.model_dump(mode="json")


def stage_evaluate(
    job: Job, model: PreTrainedModel, fixed_plan: PruningPlan, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Perplexity, by model and text: of the dense model, of the best fixed metric's cut, of the saved checkpoints."""
    if not job.report:
        return {}

    def measure(evaluated: PreTrainedModel, advance: Callable[..., None]) -> dict[str, Any]:
        return {
            name: measure_perplexity(evaluated, text.windows, name, advance, provenance=text.provenance).model_dump(
                mode="json"
            )
            for name, text in job.report.items()
        }

    models = _models_to_evaluate(job, model, fixed_plan)
    windows = sum(len(text.windows) for text in job.report.values())
    return _evaluate_each(job, "perplexity", models, measure, windows, reporter)


def stage_tasks(job: Job, model: PreTrainedModel, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Scores of lm-eval's tasks, by model and task: of the dense model and of the saved checkpoints."""
    tasks = job.tasks
    if tasks is None:
        return {}

    def measure(evaluated: PreTrainedModel, advance: Callable[..., None]) -> dict[str, Any]:
        scores = measure_tasks(in_fastest_dtype(evaluated), job.tokenizer, tasks, advance)
        return {score.task: score.model_dump(mode="json") for score in scores}

    return _evaluate_each(job, "tasks", _models_to_evaluate(job, model), measure, len(tasks), reporter)


def _models_to_evaluate(
    job: Job, model: PreTrainedModel, fixed_plan: PruningPlan | None = None
) -> dict[str, Callable[[], PreTrainedModel]]:
    def saved(folder: Path) -> Callable[[], PreTrainedModel]:
        return lambda: load_model(find_model(str(folder)), "auto", job.config.device, job.layer_wise)

    models: dict[str, Callable[[], PreTrainedModel]] = {"dense": lambda: model}
    if fixed_plan is not None:
        models["best_fixed"] = lambda: prune_model(model, job.structure, fixed_plan)
    models["searched"] = saved(job.run.model)
    if job.config.recover:
        models["recovered"] = saved(job.run.recovered)
    return models


def _evaluate_each(
    job: Job,
    kind: str,
    models: dict[str, Callable[[], PreTrainedModel]],
    measure: Callable[[PreTrainedModel, Callable[..., None]], dict[str, Any]],
    steps: int,
    reporter: Reporter,
) -> dict[str, dict[str, Any]]:
    """Measures one model after the other; what was measured of one is kept, should the next one fail."""
    path = job.run.evaluation
    kept: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text()) if path.is_file() else {}
    done = kept.setdefault(kind, {})
    if models.keys() <= done.keys():
        return done
    with reporter.stage({"perplexity": "evaluating", "tasks": "running tasks"}[kind], steps * len(models)) as advance:
        for name, make in models.items():
            if name in done:
                advance(steps)
            else:
                done[name] = measure(make(), advance)
                job.run.save_json(kept, path)
    return done


def count_saved_parameters(folder: Path) -> int:
    """Counted in the checkpoint itself, without reading its weights."""
    return build_structure(empty_model(load_config(find_model(str(folder))))).total_parameters


def write_cards(job: Job, plan: PruningPlan, result: dict[str, Any]) -> None:
    """The model cards, once all is measured."""
    config = load_config(find_model(str(job.run.model)))
    write_card(job.run.model, model_card(job.location, config, plan, result))
    if job.config.recover:
        write_card(job.run.recovered, model_card(job.location, config, plan, result, of="recovered"))
